//! `--trace`: a timeline of what each thread does.

use std::path::Path;
use std::sync::Arc;

use prequant::{Error, Trace};

use super::{hints, streams};

/// The trace that was asked for. What couldn't be written of it is told when the command is done.
pub struct Tracing(Option<Arc<Trace>>);

impl Tracing {
    /// Creates the file, if one was given; it may not lie in the folders that the run reads and writes.
    pub fn start(path: Option<&Path>, apart_from: &[&Path]) -> Result<Tracing, Error> {
        let trace = path.map(|path| Trace::create(path, apart_from).map(Arc::new));
        Ok(Tracing(trace.transpose()?))
    }

    /// For [`prequant::Options`].
    pub fn trace(&self) -> Option<Arc<Trace>> {
        self.0.clone()
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.0.as_ref().map(|trace| trace.check()) {
            let error = hints::shown_error(&error);
            streams::tell(format_args!("warning: {error}; the trace ends there, the output is unaffected"));
        }
    }
}
