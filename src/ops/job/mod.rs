//! Writing a checkpoint in a run that can be stopped at any time: what it makes, what it has finished, and how it is taken up again.

pub(crate) mod finished;
pub(crate) mod journal;
pub(crate) mod replace;
pub(crate) mod resume;
mod side_files;
pub(crate) mod staged;
pub(crate) mod write;
