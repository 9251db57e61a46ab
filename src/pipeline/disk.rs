//! Having the disk catch up: what is written goes to it early, so that little is left to wait for when a file is finished.

use super::Execution;
use super::scheduler::{DiskTask, Scheduler, StopOnPanic};
use super::trace::{Span, Subject, ThreadTrace};
use crate::error::Result;

impl Execution<'_> {
    /// Does the disk's tasks until there is none any more.
    pub(super) fn serve_disk(&self, scheduler: &Scheduler<'_>, trace: &ThreadTrace<'_>) {
        let _guard = StopOnPanic(scheduler);
        while let Some(task) = scheduler.next_of_disk() {
            let (DiskTask::WriteBack { file, .. } | DiskTask::Seal { file, .. }) = task;
            match self.serve(task, scheduler, trace) {
                Ok(()) => {}
                Err(error) => scheduler.fail(self.plan.files[file].tensors.start, error),
            }
        }
    }

    fn serve(&self, task: DiskTask, scheduler: &Scheduler<'_>, trace: &ThreadTrace<'_>) -> Result<()> {
        match task {
            DiskTask::WriteBack { file, offset, len } => {
                let begin = trace.begin();
                self.stream(file)?.output().write_back(offset, len);
                trace.end(begin, Span::Sync, Subject::Output(file), len);
            }
            DiskTask::Seal { file, outcome } => {
                let planned = &self.plan.files[file];
                let begin = trace.begin();
                self.stream(file)?.output().sync()?;
                trace.end(begin, Span::Sync, Subject::Output(file), planned.len);
                if self.crowds_memory {
                    self.stream(file)?.output().file().will_not_read(0, planned.len);
                }
                self.close(file);
                self.outputs.seal(planned, &outcome)?;
                self.context.progress.sealed(&planned.name, planned.len);
                scheduler.sealed(file, *outcome);
            }
        }
        Ok(())
    }
}
