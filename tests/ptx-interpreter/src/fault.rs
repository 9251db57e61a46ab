//! What a launch stops at.

use std::fmt;

/// Something wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A kernel did it.
    Kernel {
        /// The kernel's name.
        kernel: String,
        /// The line in the module's text.
        line: u32,
        /// The thread block's index.
        block: [u32; 3],
        /// The thread's index in it.
        thread: [u32; 3],
        /// What it did.
        problem: Problem,
    },
    /// The host did it.
    Host(Problem),
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// A kernel is launched with other parameters than it has.
    Params,
    /// A thread block has no threads, or more than the kernel allows; or there are no thread blocks.
    Threads(u64),
    /// Outside every buffer.
    OutOfBounds(u64),
    /// Outside every variable in shared memory.
    SharedOutOfBounds(u64),
    /// Not at a multiple of the access' size.
    Misaligned(u64),
    /// A byte of global memory that nobody wrote is read.
    Uninitialised(u64),
    /// A byte of shared memory that nobody wrote is read.
    SharedUninitialised(u64),
    /// A register is read before it is written.
    UninitialisedRegister(String),
    /// Two threads touch a byte of global memory in one launch, and one of them writes it.
    Race(u64),
    /// Two threads touch a byte of shared memory between two barriers, and one of them writes it.
    SharedRace(u64),
    /// A byte is read with `.nc` and written in one launch.
    ReadOnlyWritten(u64),
    /// Threads wait at a barrier that others of the thread block never reach.
    BarrierDivergence,
    /// The lanes that arrive at a shuffle are not those of its mask.
    ShuffleMask(u32),
    /// A shuffle reads from this lane, which isn't in its mask.
    ShuffleLane(u32),
    /// A thread runs for too long.
    Budget,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Params => write!(f, "the parameters aren't those that the kernel has"),
            Problem::Threads(n) => write!(f, "a launch with {n} threads in a thread block"),
            Problem::OutOfBounds(address) => write!(f, "global memory out of bounds at {address:#x}"),
            Problem::SharedOutOfBounds(address) => write!(f, "shared memory out of bounds at {address:#x}"),
            Problem::Misaligned(address) => write!(f, "misaligned access at {address:#x}"),
            Problem::Uninitialised(address) => write!(f, "uninitialised global memory read at {address:#x}"),
            Problem::SharedUninitialised(address) => write!(f, "uninitialised shared memory read at {address:#x}"),
            Problem::UninitialisedRegister(name) => write!(f, "uninitialised register {name} read"),
            Problem::Race(address) => write!(f, "race in global memory at {address:#x}"),
            Problem::SharedRace(address) => write!(f, "race in shared memory at {address:#x}"),
            Problem::ReadOnlyWritten(address) => write!(f, "read with .nc and written in one launch at {address:#x}"),
            Problem::BarrierDivergence => write!(f, "barrier that not every thread of the thread block reaches"),
            Problem::ShuffleMask(mask) => write!(f, "shuffle with mask {mask:#010x}, but other lanes arrive"),
            Problem::ShuffleLane(lane) => write!(f, "shuffle reads from inactive lane {lane}"),
            Problem::Budget => write!(f, "instruction budget exhausted"),
        }
    }
}

impl Fault {
    /// What is wrong.
    pub fn problem(&self) -> &Problem {
        match self {
            Fault::Kernel { problem, .. } | Fault::Host(problem) => problem,
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::Kernel { kernel, line, block, thread, problem } => {
                write!(f, "{kernel}, line {line}, thread {thread:?} of thread block {block:?}: {problem}")
            }
            Fault::Host(problem) => write!(f, "host: {problem}"),
        }
    }
}

impl std::error::Error for Fault {}

impl From<Problem> for Fault {
    fn from(problem: Problem) -> Fault {
        Fault::Host(problem)
    }
}
