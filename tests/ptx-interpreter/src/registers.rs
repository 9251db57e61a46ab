//! A thread's registers.

use crate::fault::Problem;
use crate::instruction::{Entry, Register};

/// The registers of one thread, with which of them were written.
pub(crate) struct Registers<'a> {
    pub entry: &'a Entry,
    pub values: &'a mut [u64],
    pub written: &'a mut [bool],
}

impl Registers<'_> {
    #[inline]
    pub fn get(&self, register: Register) -> Result<u64, Problem> {
        let at = usize::from(register);
        if self.written[at] { Ok(self.values[at]) } else { Err(self.uninitialised(at)) }
    }

    #[inline]
    pub fn set(&mut self, register: Register, value: u64) {
        let at = usize::from(register);
        self.written[at] = true;
        self.values[at] = value;
    }

    #[cold]
    fn uninitialised(&self, at: usize) -> Problem {
        Problem::UninitialisedRegister(self.entry.registers[at].clone())
    }
}
