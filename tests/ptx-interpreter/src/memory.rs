//! Global memory: separate allocations, and for each of their bytes who wrote and who read it.

use crate::fault::{Fault, Problem};

/// An allocation's address gives its number, in the bits from this one.
const NUMBER_SHIFT: u32 = 40;

/// Every allocation begins 256 bytes below a multiple of 4 GiB, so that a carry that is lost shows.
const START: u64 = 0xffff_ff00;

/// Allocations at 64-bit addresses, with wide gaps between them.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: Vec<Option<Allocation>>,
}

#[derive(Debug)]
struct Allocation {
    bytes: Vec<u8>,
    /// Whether the byte was ever written.
    written: Vec<bool>,
    traces: Vec<Trace>,
}

/// What happened to a byte during this launch. Threads are numbered from 1; 0 is none.
#[derive(Clone, Copy, Debug, Default)]
struct Trace {
    writer: u32,
    /// A thread, or [`MANY`]; [`READ_ONLY`] is added if it was read with `.nc`.
    reader: u32,
}

const MANY: u32 = READ_ONLY - 1;
const READ_ONLY: u32 = 1 << 31;

impl Memory {
    /// Memory without allocations.
    pub fn new() -> Memory {
        Memory::default()
    }

    /// Allocates `len` bytes, not yet written, and gives their address: a multiple of 256, never 0.
    pub fn allocate(&mut self, len: usize) -> u64 {
        let traces = vec![Trace::default(); len];
        self.allocations.push(Some(Allocation { bytes: vec![0; len], written: vec![false; len], traces }));
        (self.allocations.len() as u64) << NUMBER_SHIFT | START
    }

    /// Frees what was allocated at `address`. The address is not given out again.
    ///
    /// # Errors
    /// When no allocation begins there.
    pub fn free(&mut self, address: u64) -> Result<(), Fault> {
        let slot = Self::slot(address).and_then(|slot| self.allocations.get_mut(slot));
        match slot {
            Some(slot @ Some(_)) if address % (1 << NUMBER_SHIFT) == START => *slot = None,
            _ => return Err(Problem::OutOfBounds(address).into()),
        }
        Ok(())
    }

    /// Writes from the host.
    ///
    /// # Errors
    /// When the bytes are not within one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), Fault> {
        let (allocation, at) = self.find(address, bytes.len())?;
        allocation.bytes[at..][..bytes.len()].copy_from_slice(bytes);
        allocation.written[at..][..bytes.len()].fill(true);
        Ok(())
    }

    /// Writes `len` times the same byte from the host.
    ///
    /// # Errors
    /// When the bytes are not within one allocation.
    pub fn fill(&mut self, address: u64, byte: u8, len: usize) -> Result<(), Fault> {
        self.write(address, &vec![byte; len])
    }

    /// Reads from the host.
    ///
    /// # Errors
    /// When the bytes are not within one allocation, or one of them was never written.
    pub fn read(&mut self, address: u64, len: usize) -> Result<Vec<u8>, Fault> {
        let (allocation, at) = self.find(address, len)?;
        if let Some(i) = allocation.written[at..][..len].iter().position(|written| !written) {
            return Err(Problem::Uninitialised(address + i as u64).into());
        }
        Ok(allocation.bytes[at..][..len].to_vec())
    }

    /// A launch begins: nobody has touched anything.
    pub(crate) fn begin_launch(&mut self) {
        for allocation in self.allocations.iter_mut().flatten() {
            allocation.traces.fill(Trace::default());
        }
    }

    /// A thread's load of `len` bytes, up to 16.
    pub(crate) fn load(&mut self, address: u64, len: usize, thread: u32, read_only: bool) -> Result<[u8; 16], Problem> {
        let (allocation, at) = self.find(address, len)?;
        let written = &allocation.written[at..][..len];
        for (i, (trace, &written)) in allocation.traces[at..][..len].iter_mut().zip(written).enumerate() {
            trace.load(thread, read_only, written).map_err(|problem| problem(address + i as u64))?;
        }
        let mut bytes = [0; 16];
        bytes[..len].copy_from_slice(&allocation.bytes[at..][..len]);
        Ok(bytes)
    }

    /// A thread's store.
    pub(crate) fn store(&mut self, address: u64, bytes: &[u8], thread: u32) -> Result<(), Problem> {
        let (allocation, at) = self.find(address, bytes.len())?;
        for (i, trace) in allocation.traces[at..][..bytes.len()].iter_mut().enumerate() {
            trace.store(thread).map_err(|problem| problem(address + i as u64))?;
        }
        allocation.bytes[at..][..bytes.len()].copy_from_slice(bytes);
        allocation.written[at..][..bytes.len()].fill(true);
        Ok(())
    }

    fn slot(address: u64) -> Option<usize> {
        usize::try_from(address >> NUMBER_SHIFT).ok()?.checked_sub(1)
    }

    /// The allocation that holds these bytes, and where in it they are.
    fn find(&mut self, address: u64, len: usize) -> Result<(&mut Allocation, usize), Problem> {
        let outside = Problem::OutOfBounds(address);
        let slot = Self::slot(address).and_then(|slot| self.allocations.get_mut(slot));
        let Some(Some(allocation)) = slot else { return Err(outside) };
        let at = (address % (1 << NUMBER_SHIFT)).checked_sub(START);
        match at.and_then(|at| usize::try_from(at).ok()) {
            Some(at) if at + len <= allocation.bytes.len() => Ok((allocation, at)),
            _ => Err(outside),
        }
    }
}

impl Trace {
    #[inline]
    fn load(&mut self, thread: u32, read_only: bool, written: bool) -> Result<(), fn(u64) -> Problem> {
        if !written {
            return Err(Problem::Uninitialised);
        }
        if self.writer != 0 {
            if self.writer != thread {
                return Err(Problem::Race);
            } else if read_only {
                return Err(Problem::ReadOnlyWritten);
            }
        }
        let reader = self.reader & !READ_ONLY;
        let only = if reader == 0 || reader == thread { thread } else { MANY };
        self.reader = only | self.reader & READ_ONLY | if read_only { READ_ONLY } else { 0 };
        Ok(())
    }

    fn store(&mut self, thread: u32) -> Result<(), fn(u64) -> Problem> {
        let reader = self.reader & !READ_ONLY;
        if self.reader & READ_ONLY != 0 {
            return Err(Problem::ReadOnlyWritten);
        }
        if self.writer != 0 && self.writer != thread || reader != 0 && reader != thread {
            return Err(Problem::Race);
        }
        self.writer = thread;
        Ok(())
    }
}
