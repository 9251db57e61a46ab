//! A thread block's shared memory, and for each of its bytes who wrote and who read it since the last barrier.

use crate::fault::Problem;
use crate::instruction::SharedVariable;

/// Bytes before each variable that belong to none.
const GAP: u64 = 256;

/// Where a variable goes that comes after these.
pub(crate) fn place(before: &[SharedVariable], align: u64) -> u64 {
    let end = before.last().map_or(0, |last| last.address + last.size);
    (end + GAP).next_multiple_of(align)
}

#[derive(Debug)]
pub(crate) struct Shared {
    bytes: Vec<Byte>,
}

#[derive(Clone, Copy, Debug)]
struct Byte {
    value: u8,
    state: State,
    /// Threads are numbered from 1; 0 is none.
    writer: u16,
    /// A thread, or [`MANY`].
    reader: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In no variable.
    Outside,
    Uninitialised,
    Written,
}

const MANY: u16 = u16::MAX;

impl Shared {
    /// Shared memory as a thread block finds it.
    pub fn new(variables: &[SharedVariable]) -> Shared {
        let end = variables.last().map_or(0, |last| last.address + last.size);
        let mut bytes = vec![Byte { value: 0, state: State::Outside, writer: 0, reader: 0 }; end as usize];
        for variable in variables {
            for byte in &mut bytes[variable.address as usize..][..variable.size as usize] {
                byte.state = State::Uninitialised;
            }
        }
        Shared { bytes }
    }

    /// A barrier: what was touched before it may be touched by others after it.
    pub fn forget(&mut self) {
        for byte in &mut self.bytes {
            (byte.writer, byte.reader) = (0, 0);
        }
    }

    /// A thread's load of `len` bytes, up to 16.
    #[inline]
    pub fn load(&mut self, address: u64, len: usize, thread: u16) -> Result<[u8; 16], Problem> {
        let mut loaded = [0; 16];
        for ((byte, to), at) in self.range(address, len)?.iter_mut().zip(&mut loaded).zip(address..) {
            match byte.state {
                State::Outside => return Err(Problem::SharedOutOfBounds(at)),
                State::Uninitialised => return Err(Problem::SharedUninitialised(at)),
                State::Written => {}
            }
            if byte.writer != 0 && byte.writer != thread {
                return Err(Problem::SharedRace(at));
            }
            byte.reader = if byte.reader == 0 || byte.reader == thread { thread } else { MANY };
            *to = byte.value;
        }
        Ok(loaded)
    }

    /// A thread's store.
    pub fn store(&mut self, address: u64, bytes: &[u8], thread: u16) -> Result<(), Problem> {
        for ((byte, from), at) in self.range(address, bytes.len())?.iter_mut().zip(bytes).zip(address..) {
            if byte.state == State::Outside {
                return Err(Problem::SharedOutOfBounds(at));
            }
            let by_another = |who: u16| who != 0 && who != thread;
            if by_another(byte.writer) || by_another(byte.reader) {
                return Err(Problem::SharedRace(at));
            }
            *byte = Byte { value: *from, state: State::Written, writer: thread, reader: byte.reader };
        }
        Ok(())
    }

    fn range(&mut self, address: u64, len: usize) -> Result<&mut [Byte], Problem> {
        let start = usize::try_from(address).ok();
        let range = start.and_then(|start| Some(start..start.checked_add(len)?));
        range.and_then(|range| self.bytes.get_mut(range)).ok_or(Problem::SharedOutOfBounds(address))
    }
}
