//! Launches: thread blocks one after the other, each thread by itself until it has to wait.

use crate::fault::{Fault, Problem};
use crate::instruction::{Access, Entry, Fixed, Instruction, Op, Register, Shuffle, ShuffleKind, Space};
use crate::memory::Memory;
use crate::registers::Registers;
use crate::shared::Shared;

/// Instructions that a thread may execute.
const BUDGET: u32 = 1 << 22;

/// Threads in a warp.
const WARP: usize = 32;

impl Entry {
    /// Runs the kernel: `grid` thread blocks of `block` threads. Parameters are little-endian bytes.
    ///
    /// # Errors
    /// At the first fault. What was written before it stays.
    pub fn launch(
        &self,
        memory: &mut Memory,
        grid: [u32; 3],
        block: [u32; 3],
        params: &[Vec<u8>],
    ) -> Result<(), Fault> {
        let threads = block.iter().map(|&n| u64::from(n)).product();
        if threads == 0 || threads > u64::from(self.max_threads) || grid.contains(&0) {
            return Err(Problem::Threads(threads).into());
        }
        if !params.iter().map(Vec::len).eq(self.params.iter().map(|param| param.size)) {
            return Err(Problem::Params.into());
        }
        let number = |bytes: &Vec<u8>| bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte));
        let params: Vec<u64> = params.iter().map(number).collect();
        memory.begin_launch();
        let mut thread_block = ThreadBlock::new(self, memory, grid, block, &params);
        for z in 0..grid[2] {
            for y in 0..grid[1] {
                for x in 0..grid[0] {
                    thread_block.run([x, y, z])?;
                }
            }
        }
        Ok(())
    }
}

/// The thread block that is running.
struct ThreadBlock<'a> {
    entry: &'a Entry,
    memory: &'a mut Memory,
    params: &'a [u64],
    grid: [u32; 3],
    size: [u32; 3],
    index: [u32; 3],
    shared: Shared,
    threads: Vec<Thread>,
    values: Vec<u64>,
    written: Vec<bool>,
}

#[derive(Clone, Copy, Debug)]
struct Thread {
    pc: usize,
    state: State,
    executed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    AtShuffle { mask: u32 },
    AtBarrier,
    Exited,
}

impl<'a> ThreadBlock<'a> {
    fn new(
        entry: &'a Entry,
        memory: &'a mut Memory,
        grid: [u32; 3],
        size: [u32; 3],
        params: &'a [u64],
    ) -> ThreadBlock<'a> {
        let threads = size.iter().product::<u32>() as usize;
        let registers = threads * entry.registers.len();
        ThreadBlock {
            entry,
            memory,
            params,
            grid,
            size,
            index: [0; 3],
            shared: Shared::new(&entry.shared),
            threads: vec![Thread { pc: 0, state: State::Ready, executed: 0 }; threads],
            values: vec![0; registers],
            written: vec![false; registers],
        }
    }

    fn run(&mut self, index: [u32; 3]) -> Result<(), Fault> {
        self.index = index;
        self.shared = Shared::new(&self.entry.shared);
        self.threads.fill(Thread { pc: 0, state: State::Ready, executed: 0 });
        self.written.fill(false);
        for thread in 0..self.threads.len() {
            self.set_fixed(thread);
        }
        while self.threads.iter().any(|thread| thread.state != State::Exited) {
            for first in (0..self.threads.len()).step_by(WARP) {
                while self.run_warp(first)? {}
            }
            self.release_barrier()?;
        }
        Ok(())
    }

    /// Gives a thread its constants, parameters and special registers.
    fn set_fixed(&mut self, thread: usize) {
        let tid = self.tid(thread);
        for &(register, fixed) in &self.entry.fixed {
            let value = match fixed {
                Fixed::Constant(value) => value,
                Fixed::Param(index) => self.params[index],
                Fixed::Tid(axis) => u64::from(tid[axis]),
                Fixed::Ctaid(axis) => u64::from(self.index[axis]),
                Fixed::Ntid(axis) => u64::from(self.size[axis]),
                Fixed::Nctaid(axis) => u64::from(self.grid[axis]),
            };
            self.registers(thread).set(register, value);
        }
    }

    fn tid(&self, thread: usize) -> [u32; 3] {
        let (thread, [x, y, _]) = (thread as u32, self.size);
        [thread % x, thread / x % y, thread / x / y]
    }

    fn registers(&mut self, thread: usize) -> Registers<'_> {
        let count = self.entry.registers.len();
        let range = thread * count..(thread + 1) * count;
        Registers { entry: self.entry, values: &mut self.values[range.clone()], written: &mut self.written[range] }
    }

    /// Runs a warp's threads until they wait, and does the shuffles that are complete. Whether there were any.
    fn run_warp(&mut self, first: usize) -> Result<bool, Fault> {
        let lanes = WARP.min(self.threads.len() - first);
        for thread in first..first + lanes {
            if self.threads[thread].state == State::Ready {
                self.run_thread(thread).map_err(|problem| self.fault(thread, problem))?;
            }
        }
        let mut shuffled = false;
        for lane in 0..lanes {
            let Thread { pc, state: State::AtShuffle { mask }, .. } = self.threads[first + lane] else { continue };
            if mask >> lane & 1 == 0 {
                return Err(self.fault(first + lane, Problem::ShuffleMask(mask)));
            }
            let waits = |lane: usize| {
                lane < lanes && {
                    let other = self.threads[first + lane];
                    other.pc == pc && other.state == State::AtShuffle { mask }
                }
            };
            if (0..WARP).all(|lane| mask >> lane & 1 == 0 || waits(lane)) {
                self.shuffle(first, mask)?;
                shuffled = true;
            }
        }
        Ok(shuffled)
    }

    /// Does the shuffle that all lanes of `mask` wait at.
    fn shuffle(&mut self, first: usize, mask: u32) -> Result<(), Fault> {
        let lanes = (0..WARP as u32).filter(|lane| mask >> lane & 1 == 1);
        let mut values = [None; WARP];
        let mut results = [(0, false); WARP];
        let at = self.threads[first + mask.trailing_zeros() as usize].pc;
        let Op::Shuffle(shuffle) = self.entry.code[at].op else { unreachable!("threads wait here for a shuffle") };
        for lane in lanes.clone() {
            let thread = first + lane as usize;
            let value = self.registers(thread).get(shuffle.a);
            values[lane as usize] = Some(value.map_err(|problem| self.fault(thread, problem))?);
        }
        for lane in lanes.clone() {
            let thread = first + lane as usize;
            let from = source_lane(&self.registers(thread), &shuffle, lane);
            let (from, in_range) = from.map_err(|problem| self.fault(thread, problem))?;
            let value = values[from as usize].ok_or_else(|| self.fault(thread, Problem::ShuffleLane(from)))?;
            results[lane as usize] = (value, in_range);
        }
        for lane in lanes {
            let thread = first + lane as usize;
            let (value, in_range) = results[lane as usize];
            let mut registers = self.registers(thread);
            registers.set(shuffle.d, value);
            if let Some(predicate) = shuffle.in_range {
                registers.set(predicate, u64::from(in_range));
            }
            self.threads[thread].pc += 1;
            self.threads[thread].state = State::Ready;
        }
        Ok(())
    }

    /// No thread can go on by itself: either all are at one barrier, or all have exited, or something is wrong.
    fn release_barrier(&mut self) -> Result<(), Fault> {
        let exited = |thread: &Thread| thread.state == State::Exited;
        for (i, thread) in self.threads.iter().enumerate() {
            if let State::AtShuffle { mask } = thread.state {
                return Err(self.fault(i, Problem::ShuffleMask(mask)));
            }
        }
        let Some(waiting) = self.threads.iter().position(|thread| !exited(thread)) else { return Ok(()) };
        let pc = self.threads[waiting].pc;
        if self.threads.iter().any(|thread| exited(thread) || thread.pc != pc) {
            return Err(self.fault(waiting, Problem::BarrierDivergence));
        }
        self.shared.forget();
        for thread in &mut self.threads {
            thread.pc += 1;
            thread.state = State::Ready;
        }
        Ok(())
    }

    /// Runs a thread until it waits or exits.
    fn run_thread(&mut self, thread: usize) -> Result<(), Problem> {
        let code = &self.entry.code;
        let Thread { mut pc, mut executed, .. } = self.threads[thread];
        let count = self.entry.registers.len();
        let range = thread * count..(thread + 1) * count;
        let mut running = Running {
            registers: Registers {
                entry: self.entry,
                values: &mut self.values[range.clone()],
                written: &mut self.written[range],
            },
            memory: self.memory,
            shared: &mut self.shared,
            in_block: thread as u16 + 1,
            in_grid: global_number(self.index, self.grid, self.threads.len(), thread),
        };
        let stop = loop {
            executed += 1;
            let result = if executed > BUDGET { Err(Problem::Budget) } else { running.step(&code[pc]) };
            match result {
                Ok(Step::Next) => pc += 1,
                Ok(Step::To(target)) => pc = target,
                Ok(Step::Wait(state)) => break Ok(state),
                Err(problem) => break Err(problem),
            }
        };
        let state = stop.as_ref().copied().unwrap_or(State::Exited);
        self.threads[thread] = Thread { pc, state, executed };
        stop.map(|_| ())
    }

    fn fault(&self, thread: usize, problem: Problem) -> Fault {
        Fault::Kernel {
            kernel: self.entry.name.clone(),
            line: self.entry.code[self.threads[thread].pc].line,
            block: self.index,
            thread: self.tid(thread),
            problem,
        }
    }
}

/// A thread's number in the whole launch, from 1.
fn global_number(block: [u32; 3], grid: [u32; 3], threads: usize, thread: usize) -> u32 {
    let block = (block[2] * grid[1] + block[1]) * grid[0] + block[0];
    block * threads as u32 + thread as u32 + 1
}

/// The lane that `lane` reads from, and whether the one it asked for was in range.
fn source_lane(registers: &Registers<'_>, shuffle: &Shuffle, lane: u32) -> Result<(u32, bool), Problem> {
    let [b, c] = [registers.get(shuffle.b)? as u32 & 31, registers.get(shuffle.c)? as u32];
    let (clamp, segment) = (c & 31, c >> 8 & 31);
    let last = lane & segment | clamp & !segment;
    let asked = match shuffle.kind {
        ShuffleKind::Butterfly => lane ^ b,
        ShuffleKind::Down => lane + b,
    };
    Ok(if asked <= last { (asked, true) } else { (lane, false) })
}

/// A thread with all that it can touch.
struct Running<'a> {
    registers: Registers<'a>,
    memory: &'a mut Memory,
    shared: &'a mut Shared,
    in_block: u16,
    in_grid: u32,
}

/// Where a thread continues.
enum Step {
    Next,
    To(usize),
    Wait(State),
}

impl Running<'_> {
    #[inline]
    fn step(&mut self, instruction: &Instruction) -> Result<Step, Problem> {
        let registers = &mut self.registers;
        if let Some(guard) = instruction.guard
            && registers.get(guard.predicate)? != guard.expected
        {
            return Ok(Step::Next);
        }
        match instruction.op {
            Op::Unary { f, d, a } => registers.set(d, f(registers.get(a)?)),
            Op::Binary { f, d, a, b } => registers.set(d, f(registers.get(a)?, registers.get(b)?)),
            Op::Ternary { f, d, a, b, c } => {
                registers.set(d, f(registers.get(a)?, registers.get(b)?, registers.get(c)?));
            }
            Op::Quaternary { f, d, sources: [a, b, c, e] } => {
                registers.set(d, f(registers.get(a)?, registers.get(b)?, registers.get(c)?, registers.get(e)?));
            }
            Op::Load { from, access, d } => self.load(from, access, d)?,
            Op::Store { to, access, a } => self.store(to, access, a)?,
            Op::Branch(target) => return Ok(Step::To(target)),
            Op::Shuffle(Shuffle { mask, .. }) => {
                return Ok(Step::Wait(State::AtShuffle { mask: registers.get(mask)? as u32 }));
            }
            Op::Barrier => return Ok(Step::Wait(State::AtBarrier)),
            Op::Return => return Ok(Step::Wait(State::Exited)),
        }
        Ok(Step::Next)
    }

    fn address(&self, access: Access) -> Result<u64, Problem> {
        let address = self.registers.get(access.base)?.wrapping_add_signed(access.offset);
        let aligned = address.is_multiple_of((access.size * access.count) as u64);
        if aligned { Ok(address) } else { Err(Problem::Misaligned(address)) }
    }

    fn load(&mut self, from: Space, access: Access, d: [Register; 4]) -> Result<(), Problem> {
        let (address, len) = (self.address(access)?, access.size * access.count);
        let bytes = match from {
            Space::Global => self.memory.load(address, len, self.in_grid, false)?,
            Space::ReadOnly => self.memory.load(address, len, self.in_grid, true)?,
            Space::Shared => self.shared.load(address, len, self.in_block)?,
        };
        for (register, bytes) in d.into_iter().zip(bytes[..len].chunks_exact(access.size)) {
            self.registers.set(register, bytes.iter().rev().fold(0, |number, &byte| number << 8 | u64::from(byte)));
        }
        Ok(())
    }

    fn store(&mut self, to: Space, access: Access, a: [Register; 4]) -> Result<(), Problem> {
        let (address, len) = (self.address(access)?, access.size * access.count);
        let mut bytes = [0; 16];
        for (register, bytes) in a.into_iter().zip(bytes[..len].chunks_exact_mut(access.size)) {
            bytes.copy_from_slice(&self.registers.get(register)?.to_le_bytes()[..access.size]);
        }
        match to {
            Space::Shared => self.shared.store(address, &bytes[..len], self.in_block),
            Space::Global | Space::ReadOnly => self.memory.store(address, &bytes[..len], self.in_grid),
        }
    }
}
