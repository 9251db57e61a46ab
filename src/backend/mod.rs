//! What quantizes: this machine's processor, or devices that do it for its threads.
//!
//! Whoever has a run of a tensor's weights to quantize fills a [`Lane`] with it and gets the codes from it. Threads have
//! lanes of their own on the processor; those of devices are fewer than threads, and shared. The bytes are the same
//! wherever a run is quantized: what a device can't do is done by the processor.
//!
//! A new kind of device is a folder here that implements [`Backend`] and [`Lane`], and a line in `KINDS`.

mod choice;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;

use std::error::Error as StdError;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

pub use choice::{ChosenDevice, Device, DeviceChoice};
pub(crate) use choice::{Opening, Work};
pub use cpu::{Cpu, CpuLane};

use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::{Codec, Coding};
use crate::kernel::Figures;

/// Devices that can be chosen beside the processor, in the order that `auto` tries them.
const KINDS: &[Kind] = &[
    #[cfg(feature = "cuda")]
    cuda::KIND,
];

/// A kind of devices, which are numbered from 0.
struct Kind {
    /// Its name in a choice, before a colon and a number.
    name: &'static str,
    /// One of them, for people: `an NVIDIA GPU`.
    about: &'static str,
    /// Opens the devices of these numbers, at least one, as one backend.
    open: fn(&[usize]) -> Opened,
    /// Opens the first device that can be used and has so many bytes of memory free; or says why the first can't be used.
    first: fn(u64) -> Opened,
}

/// A backend, or why there is none.
type Opened = Result<Arc<dyn Backend>, Unusable>;

/// Why a device can't be used, in words.
pub(crate) type Unusable = Box<dyn StdError + Send + Sync>;

/// What quantizes; chosen once, and passed down.
pub trait Backend: fmt::Debug + Send + Sync {
    /// Its name for people, as `CPU (AVX-512)` or `cuda:0 (NVIDIA H200)`.
    fn name(&self) -> String;

    /// What drives it, for people, if that isn't this program alone.
    fn driver(&self) -> Option<String> {
        None
    }

    /// The processor, which does what devices don't.
    fn cpu(&self) -> Cpu {
        Cpu::detect()
    }

    /// The devices that have lanes; `None` if each thread has its own on the processor, and nothing else.
    fn devices(&self) -> Option<Devices>;

    /// Whether lanes quantize by this codec, in rows of so many columns. Otherwise the processor does.
    fn quantizes(&self, codec: &Codec, columns: u64) -> bool;

    /// Gets ready to quantize by this codec, before anything is written. Lanes will take `memory` bytes of each device.
    ///
    /// # Errors
    /// When a device fails or has less.
    fn prepare(&self, codec: &Codec, memory: u64) -> Result<()>;

    /// Bytes that a lane takes here, and as many on its device if it has one.
    fn lane_len(&self, size: &LaneSize) -> u64;

    /// Makes a lane on a device, counted from 0.
    fn open_lane(&self, device: usize, size: &LaneSize) -> Result<Box<dyn Lane>, Fault>;
}

/// Devices whose lanes are shared by threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Devices {
    /// How many there are, at least one.
    pub count: usize,
    /// Lanes that one needs to be kept busy: to be given work, do it and give it back at the same time, say.
    pub lanes_each: usize,
    /// Threads more than there would be otherwise: as many wait for devices while others read, hash and write.
    pub waiting: usize,
    /// Bytes that are taken on each, beside its lanes.
    pub reserved: u64,
}

/// What a lane must have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LaneSize {
    /// Bytes of weights.
    pub source: usize,
    /// Bytes of codes.
    pub packed: usize,
    /// Blocks or groups.
    pub groups: usize,
    /// Bytes of a group's scale and zero point, if they aren't what `absmax` of the figures is.
    pub group_len: usize,
    /// Absmax that are quantized at once.
    pub absmax: usize,
}

/// A place to quantize in, used by one thread at a time.
pub trait Lane: Send {
    /// Its room for weights: the first `len` bytes, to be filled.
    ///
    /// # Panics
    /// When the lane is smaller.
    fn source(&mut self, len: usize) -> &mut [u8];

    /// The largest magnitude of weights in [`Lane::source`], 16 or a multiple of that, which start at a multiple of 16 bytes;
    /// `None` if one isn't finite. A device that has them then needs them no more to quantize them.
    ///
    /// # Panics
    /// When the lane is smaller, or the weights aren't such.
    fn absmax(&mut self, place: Range<usize>, dtype: FloatDtype) -> Result<Option<f32>, Fault>;

    /// Quantizes a run of weights in [`Lane::source`], which start at a multiple of 16 bytes; `None` if one isn't finite.
    ///
    /// # Panics
    /// When the lane is smaller, or for what [`Backend::quantizes`] denies.
    fn quantize(&mut self, run: &Run<'_>) -> Result<Option<Encoded<'_>>, Fault>;

    /// Quantizes `absmax` less `offset` to 8 bits; returns the codes and the nested absmax. See
    /// [`crate::kernel::block::nested::quantize`].
    ///
    /// # Panics
    /// As above.
    fn quantize_absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), Fault>;
}

/// Weights to be quantized: whole blocks, or whole groups of a tensor.
#[derive(Clone, Debug)]
pub struct Run<'a> {
    /// How.
    pub codec: &'a Codec,
    /// The weights' dtype.
    pub dtype: FloatDtype,
    /// Elements of the tensor's rows.
    pub columns: u64,
    /// The scale of all groups' scales, if the format has it.
    pub tensor_scale: Option<f32>,
    /// Where the weights are in a lane's source.
    pub place: Range<usize>,
}

impl Run<'_> {
    /// The number of weights.
    pub fn elements(&self) -> usize {
        self.place.len() / self.dtype.size()
    }

    /// Blocks or groups.
    fn groups(&self) -> usize {
        (self.elements() as u64).div_ceil(self.codec.block_len(self.columns)) as usize
    }

    /// Bytes of codes.
    fn packed_len(&self) -> usize {
        self.codec.packed_len(self.elements() as u64, self.columns) as usize
    }

    /// How kernels code it.
    fn coding(&self) -> Coding {
        self.codec.coding(self.columns, self.tensor_scale)
    }
}

/// The length of the rows that kernels take a tensor for. Where a run needn't be whole rows, rows have no padding: groups lie
/// one after the other, as rows do.
fn row_len(codec: &Codec, columns: u64) -> usize {
    (if codec.has_whole_rows() { columns } else { codec.block_len(columns) }) as usize
}

/// What a run was quantized to.
pub struct Encoded<'a> {
    /// Codes.
    pub packed: &'a [u8],
    /// One scale per group, as stored; none for blocks, whose absmax are their scales.
    pub scales: &'a [u8],
    /// One zero point per group, 0 to 15; none for formats without them.
    pub zero_points: &'a [u8],
    /// Of each block or group, or summed on the way: less has to come back from a device.
    pub figures: Figures<'a>,
}

/// A device failed at its work.
#[derive(Debug, thiserror::Error)]
#[error("{device}: {why}")]
pub struct Fault {
    /// The device's name for people.
    pub device: String,
    /// What failed, in words.
    pub why: Box<dyn StdError + Send + Sync>,
    /// Whether it is memory that ran out, on the device or for what it shares with this machine.
    pub is_out_of_memory: bool,
}

impl From<Fault> for Error {
    fn from(Fault { device, why, .. }: Fault) -> Error {
        Error::Device { device, fault: why }
    }
}
