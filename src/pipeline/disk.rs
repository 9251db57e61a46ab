//! Having the disk catch up: what is written goes to it early, so that little is left to wait for when a file is finished.

use super::Execution;
use super::scheduler::{DiskTask, Scheduler};
use super::worker::StopOnPanic;
use crate::error::Result;

impl Execution<'_> {
    /// Does the disk's tasks until there is none any more.
    pub(super) fn serve_disk(&self, scheduler: &Scheduler<'_>) {
        let _guard = StopOnPanic(scheduler);
        while let Some(task) = scheduler.next_of_disk() {
            let (DiskTask::WriteBack { file, .. } | DiskTask::Seal { file, .. }) = task;
            match self.serve(task, scheduler) {
                Ok(()) => {}
                Err(error) => scheduler.fail(self.plan.files[file].tensors.start, error),
            }
        }
    }

    fn serve(&self, task: DiskTask, scheduler: &Scheduler<'_>) -> Result<()> {
        match task {
            DiskTask::WriteBack { file, offset, len } => self.stream(file)?.output().write_back(offset, len),
            DiskTask::Seal { file, outcome } => {
                let planned = &self.plan.files[file];
                self.stream(file)?.output().sync()?;
                self.close(file);
                self.outputs.seal(planned, &outcome)?;
                self.context.progress.sealed(&planned.name, planned.len);
                scheduler.sealed();
            }
        }
        Ok(())
    }
}
