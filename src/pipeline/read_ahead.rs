//! Reading ahead: the system is told of what will be read, by a thread that has time to wait for it.

use super::Execution;
use super::scheduler::Scheduler;

/// Has the system read what is handed out next.
pub(super) fn run(_execution: &Execution<'_>, _scheduler: &Scheduler<'_>) {}
