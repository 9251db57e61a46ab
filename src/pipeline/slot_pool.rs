//! The ring of slots on the GPUs: what bounds their memory, and keeps them busy.
//!
//! A thread takes a slot, reads into its pinned buffer, has the GPU work on it, writes the results, and gives the slot
//! back. Slots are made as they are needed; when a GPU's memory runs out, half of them are given up.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use crate::backend::cuda::{Fault, Gpu, Slot, SlotSize};
use crate::error::{Error, Result};
use crate::pipeline::budget::SlotPoolBudget;

/// Slots, at most so many, over all GPUs.
pub struct SlotPool<'a> {
    gpus: &'a [Arc<Gpu>],
    size: SlotSize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: VecDeque<Slot>,
    /// Slots that there are on each GPU, in use or free.
    made: Vec<usize>,
    limit: usize,
}

/// What keeps work in a slot from its end.
pub enum Failed {
    /// The GPU.
    Device(Fault),
    /// Anything else.
    Other(Error),
}

impl From<Fault> for Failed {
    fn from(fault: Fault) -> Failed {
        Failed::Device(fault)
    }
}

impl From<Error> for Failed {
    fn from(error: Error) -> Failed {
        Failed::Other(error)
    }
}

impl<'a> SlotPool<'a> {
    /// A ring on at least one GPU.
    pub fn new(gpus: &'a [Arc<Gpu>], budget: SlotPoolBudget) -> SlotPool<'a> {
        let state = State { free: VecDeque::new(), made: vec![0; gpus.len()], limit: budget.slots };
        SlotPool { gpus, size: budget.slot, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Does `work` in a slot, once one is free; again, in another one, while memory runs out and slots can be given up.
    pub fn with<T>(&self, mut work: impl FnMut(&mut Slot) -> Result<T, Failed>) -> Result<T> {
        loop {
            let mut held = Held { ring: self, slot: Some(self.take()?) };
            let Some(slot) = &mut held.slot else { continue };
            match work(slot) {
                Ok(result) => return Ok(result),
                Err(Failed::Other(error)) => return Err(error),
                Err(Failed::Device(fault)) if fault.is_out_of_memory() && self.halve() => self.discard(&mut held),
                Err(Failed::Device(fault)) => return Err(device_error(slot.gpu(), fault)),
            }
        }
    }

    fn take(&self) -> Result<Slot> {
        let mut state = self.lock();
        loop {
            if let Some(slot) = state.free.pop_front() {
                return Ok(slot);
            }
            if state.total() < state.limit {
                let (which, _) = state.made.iter().enumerate().min_by_key(|(_, made)| **made).unwrap_or((0, &0));
                state.made[which] += 1;
                drop(state);
                match Slot::new(&self.gpus[which], self.size) {
                    Ok(slot) => return Ok(slot),
                    Err(fault) => {
                        self.forget(which);
                        if !fault.is_out_of_memory() || !self.halve() {
                            return Err(device_error(&self.gpus[which], fault));
                        }
                        state = self.lock();
                    }
                }
                continue;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Memory has run out: makes do with half as many slots. False if one was all there was.
    fn halve(&self) -> bool {
        let mut state = self.lock();
        let possible = state.limit > 1;
        state.limit = (state.limit / 2).max(1);
        possible
    }

    /// Frees the slot's memory before another one is waited for.
    fn discard(&self, held: &mut Held<'_, '_>) {
        if let Some(slot) = held.slot.take() {
            let which = self.index_of(&slot);
            drop(slot);
            self.forget(which);
        }
    }

    fn forget(&self, which: usize) {
        self.lock().made[which] -= 1;
        self.changed.notify_all();
    }

    fn give_back(&self, slot: Slot) {
        let mut state = self.lock();
        if state.total() <= state.limit {
            state.free.push_back(slot);
            self.changed.notify_one();
        } else {
            drop(state);
            self.discard(&mut Held { ring: self, slot: Some(slot) });
        }
    }

    fn index_of(&self, slot: &Slot) -> usize {
        self.gpus.iter().position(|gpu| Arc::ptr_eq(gpu, slot.gpu())).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn total(&self) -> usize {
        self.made.iter().sum()
    }
}

/// A slot in use, which goes back whatever happens.
struct Held<'r, 'a> {
    ring: &'r SlotPool<'a>,
    slot: Option<Slot>,
}

impl Drop for Held<'_, '_> {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            self.ring.give_back(slot);
        }
    }
}

fn device_error(gpu: &Gpu, fault: Fault) -> Error {
    Error::Device { device: gpu.to_string(), fault }
}
