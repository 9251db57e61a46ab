//! What the tool does: each operation opens, plans, executes and seals.

pub mod dequantize;
pub mod job;
mod model_card;
pub mod quantize;
mod relayout;
pub mod verify;

pub use relayout::recipe_of;
