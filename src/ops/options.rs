//! How operations do their work.

use std::sync::Arc;
use std::thread;

use crate::backend::{Device, DeviceChoice};
use crate::checkpoint::{Config, Source};
use crate::pipeline::{Limits, Trace};

/// Bytes that a config takes usually at most, which every estimate has room for.
const USUAL_CONFIG: u64 = 1 << 20;

/// How to convert: what decides nothing about the output's bytes.
#[derive(Clone, Debug)]
pub struct Options {
    /// The most memory to use, in bytes: of everything that the process holds, a GPU driver's own memory excepted. Where it is
    /// `None`, the larger of 256 MiB and 64 MiB + 1 KiB for each tensor of the source + what buffers need at least.
    pub memory: Option<u64>,
    /// Threads to use.
    pub threads: usize,
    /// What quantizes: a backend or a [`DeviceChoice`], which is opened while the conversion is planned.
    pub device: Device,
    /// The most memory to use of each device, in bytes.
    pub device_memory: u64,
    /// Whether the manifest gets the SHA-256 of the source's files.
    pub hash_source: bool,
    /// Whether to replace a checkpoint at the destination.
    pub force: bool,
    /// Whether to discard what an earlier, unfinished run left there.
    pub restart: bool,
    /// Whether links beside the weights may lead anywhere: what they lead to is copied, folders too. Otherwise a link out of the
    /// source's folder is an error, unless it leads to where the weights are or into the hub's cache.
    pub follow_links: bool,
    /// Where to record what each thread does, if anywhere. Failing to is no error of the run: [`Trace::check`] tells of it.
    pub trace: Option<Arc<Trace>>,
}

impl Default for Options {
    /// The default of memory here, 256 MiB on a device, all cores, the processor with its fastest kernel.
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from);
        Options {
            memory: None,
            threads,
            device: DeviceChoice::Cpu.into(),
            device_memory: 256 << 20,
            hash_source: false,
            force: false,
            restart: false,
            follow_links: false,
            trace: None,
        }
    }
}

impl Options {
    /// The bounds on memory and threads for what reads `source` and holds so many bytes beside its plan.
    pub(crate) fn limits(&self, source: &Source, beside: u64) -> Limits {
        let Options { memory, threads, device_memory, .. } = *self;
        let config = source.config.as_ref().map_or(0, Config::held_len);
        let beside = beside.saturating_add(config.saturating_sub(USUAL_CONFIG));
        Limits { memory, beside, source_tensors: source.tensors().count() as u64, threads, device_memory }
    }
}
