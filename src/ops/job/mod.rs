//! A run that can be stopped at any time: what it was, what it has finished, and how it is taken up again.

pub(crate) mod journal;
pub(crate) mod resume;
mod staged;

pub(crate) use staged::Staged;
