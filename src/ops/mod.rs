//! What the tool does: each operation opens, plans, executes and seals.

pub(crate) mod dequantize;
mod global_scales;
mod hub_count;
pub(crate) mod inspect;
pub(crate) mod job;
mod kept_modules;
pub(crate) mod merge;
mod model_card;
pub(crate) mod options;
pub(crate) mod quantize;
mod recorded_config;
mod recorded_source;
mod records;
mod relayout;
pub(crate) mod verify;

pub(crate) use relayout::recipe_of;
