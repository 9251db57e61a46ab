//! The lanes on devices: what bounds their memory, and keeps them busy.
//!
//! A thread takes a lane, reads into its room here, has the device work on it, writes the results, and gives the lane
//! back. Lanes are made as they are needed; when a device's memory runs out, half of them are given up.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::budget::LaneBudget;
use crate::backend::{Backend, Fault, Lane, LaneSize};
use crate::error::{Error, Result};

/// Lanes, at most so many, over all devices.
pub(crate) struct LanePool<'a> {
    backend: &'a dyn Backend,
    size: LaneSize,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    free: VecDeque<Opened>,
    /// Lanes that there are on each device, in use or free.
    made: Vec<usize>,
    limit: usize,
}

/// A lane, and the device it is on.
struct Opened {
    lane: Box<dyn Lane>,
    device: usize,
}

/// What keeps work in a lane from its end.
pub enum Failed {
    /// The device.
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

impl From<Failed> for Error {
    fn from(failed: Failed) -> Error {
        match failed {
            Failed::Device(fault) => fault.into(),
            Failed::Other(error) => error,
        }
    }
}

impl<'a> LanePool<'a> {
    /// Lanes on at least one device.
    pub(crate) fn new(backend: &'a dyn Backend, budget: LaneBudget) -> LanePool<'a> {
        let state = State { free: VecDeque::new(), made: vec![0; budget.devices.count], limit: budget.count };
        LanePool { backend, size: budget.size, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Does `work` in a lane, once one is free; again, in another one, while memory runs out and lanes can be given up.
    pub(crate) fn with<T>(&self, mut work: impl FnMut(&mut dyn Lane) -> Result<T, Failed>) -> Result<T> {
        loop {
            let mut held = Held { pool: self, lane: Some(self.take()?) };
            let Some(opened) = &mut held.lane else { continue };
            match work(&mut *opened.lane) {
                Ok(result) => return Ok(result),
                Err(Failed::Device(fault)) if fault.is_out_of_memory && self.halve() => self.discard(&mut held),
                Err(failed) => return Err(failed.into()),
            }
        }
    }

    fn take(&self) -> Result<Opened> {
        let mut state = self.lock();
        loop {
            if let Some(opened) = state.free.pop_front() {
                return Ok(opened);
            }
            if state.total() < state.limit {
                let (device, _) = state.made.iter().enumerate().min_by_key(|(_, made)| **made).unwrap_or((0, &0));
                state.made[device] += 1;
                drop(state);
                match self.backend.open_lane(device, &self.size) {
                    Ok(lane) => return Ok(Opened { lane, device }),
                    Err(fault) => {
                        self.forget(device);
                        if !fault.is_out_of_memory || !self.halve() {
                            return Err(fault.into());
                        }
                        state = self.lock();
                    }
                }
                continue;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Memory has run out: makes do with half as many lanes. False if one was all there was.
    fn halve(&self) -> bool {
        let mut state = self.lock();
        let possible = state.limit > 1;
        state.limit = (state.limit / 2).max(1);
        possible
    }

    /// Frees the lane's memory before another one is waited for.
    fn discard(&self, held: &mut Held<'_, '_>) {
        if let Some(Opened { lane, device }) = held.lane.take() {
            drop(lane);
            self.forget(device);
        }
    }

    fn forget(&self, device: usize) {
        self.lock().made[device] -= 1;
        self.changed.notify_all();
    }

    fn give_back(&self, opened: Opened) {
        let mut state = self.lock();
        if state.total() <= state.limit {
            state.free.push_back(opened);
            self.changed.notify_one();
        } else {
            drop(state);
            self.discard(&mut Held { pool: self, lane: Some(opened) });
        }
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

/// A lane in use, which goes back whatever happens.
struct Held<'p, 'a> {
    pool: &'p LanePool<'a>,
    lane: Option<Opened>,
}

impl Drop for Held<'_, '_> {
    fn drop(&mut self) {
        if let Some(opened) = self.lane.take() {
            self.pool.give_back(opened);
        }
    }
}
