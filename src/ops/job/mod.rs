//! A run that can be stopped at any time: what it was, what it has finished, and how it is taken up again.

pub mod journal;
pub mod resume;
mod staged;

pub use staged::Staged;
