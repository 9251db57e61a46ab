//! NVIDIA GPUs, through the driver alone: no toolkit, no compiler.
//!
//! `kernels.cu` is [`crate::kernel::block`]'s scalar kernel in CUDA C, and `groups.cu` is [`crate::kernel::group`]'s; their PTX is committed beside
//! them and compiled by the driver: the former's when a [`Gpu`] is opened, the latter's when it is first needed. A lane is a
//! `Slot`; several of them, each used by one thread at a time, let copies to the device, kernels and copies back overlap.

mod driver;
mod groups;
mod results;
mod slot;
mod tables;

use std::ffi::CString;
use std::fmt;
use std::sync::{Arc, OnceLock};

pub use groups::{GROUPS_PTX, GroupKernel, largest_name, largest_thread_blocks, tensor_factor};
use slot::{Slot, SlotSize};
pub use tables::{codebook_table, dynamic_map_table};

use super::{Backend, Devices, Kind, Lane, LaneSize};
use crate::dtype::FloatDtype;
use crate::error::{Error, Result};
use crate::format::{Codebook, Codec, Scales, fp4, nf4};
use crate::kernel::SUMMED;
use driver::{Context, DeviceBuffer, Fault, Function, Module};
use groups::GroupModule;

/// The kernels, as every driver of CUDA 11.8 and later takes them; made from kernels.cu by scripts/build-ptx.
pub const PTX: &str = include_str!("kernels.ptx");

/// Threads in a thread block of all kernels but `quantize_absmax`.
pub const THREADS: u32 = 128;

/// Blocks of weights that one of their thread blocks takes at a time.
const BLOCKS_AT_A_TIME: u32 = 64;

/// Thread blocks to launch for so many blocks of weights: enough to fill any GPU, and beyond that so few that each one reads
/// its table once for sixteen times its share.
pub fn thread_blocks(blocks: usize) -> u32 {
    let all = u32::try_from(blocks).unwrap_or(u32::MAX).div_ceil(BLOCKS_AT_A_TIME);
    all.min((all / 16).max(1024))
}

/// Thread blocks to launch for summing the figures of so many blocks or groups.
pub fn sum_thread_blocks(blocks: usize) -> u32 {
    blocks.div_ceil(SUMMED).div_ceil(THREADS as usize) as u32
}

/// GPUs, named `cuda:N`.
pub(super) const KIND: Kind = Kind {
    name: "cuda",
    about: "an NVIDIA GPU",
    open: |ordinals| {
        let gpus = ordinals.iter().map(|&ordinal| Gpu::open(ordinal)).collect::<Result<_, _>>()?;
        Ok(Arc::new(Cuda { gpus }))
    },
    first: |memory| Ok(Arc::new(Cuda { gpus: vec![first_usable(memory)?] })),
};

/// Slots that a GPU needs to copy to the device, run a kernel and copy back at the same time.
const SLOTS: usize = 3;

/// Threads that wait for GPUs while others read, hash and write.
const WAITING: usize = 3;

/// Bytes that a GPU's tables take at most, beside its slots.
const TABLE_BYTES: u64 = 4096;

/// What the PTX was compiled for, and the oldest GPU that runs it: Turing.
const MIN_CAPABILITY: (i32, i32) = (7, 5);

/// CUDA 12.0, which came with driver 525.
const MIN_VERSION: i32 = 12_000;

/// A kernel of kernels.cu, in one of its three dtypes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BlockKernel {
    /// Thresholds of which no two share a bin.
    Nf4,
    /// Those of FP4.
    Fp4,
}

impl BlockKernel {
    /// The kernel for a codebook, if there is one.
    fn new(codebook: &Codebook) -> Option<BlockKernel> {
        match codebook {
            _ if *codebook == nf4::CODEBOOK => Some(BlockKernel::Nf4),
            _ if *codebook == fp4::CODEBOOK => Some(BlockKernel::Fp4),
            _ => None,
        }
    }
}

/// GPUs, at least one.
#[derive(Debug)]
struct Cuda {
    gpus: Vec<Arc<Gpu>>,
}

impl Backend for Cuda {
    /// As `cuda:0 (NVIDIA H200), cuda:1 (NVIDIA H200)`.
    fn name(&self) -> String {
        self.gpus.iter().map(|gpu| gpu.to_string()).collect::<Vec<_>>().join(", ")
    }

    fn driver(&self) -> Option<String> {
        self.gpus.first().map(|gpu| format!("CUDA {} driver", Version(gpu.version)))
    }

    fn devices(&self) -> Option<Devices> {
        Some(Devices { count: self.gpus.len(), lanes_each: SLOTS, waiting: WAITING, reserved: TABLE_BYTES })
    }

    fn quantizes(&self, codec: &Codec, columns: u64) -> bool {
        match codec.scales {
            Scales::Blocks { codebook, .. } => BlockKernel::new(codebook).is_some(),
            Scales::Groups { .. } => GroupKernel::of(codec, columns).is_some(),
        }
    }

    fn prepare(&self, codec: &Codec, memory: u64) -> Result<()> {
        for gpu in &self.gpus {
            let free = gpu.free_memory().map_err(|fault| gpu.fault(fault))?;
            if free < memory {
                let why = Unusable::LittleMemory { name: gpu.name.clone(), free, needed: memory };
                return Err(Error::NoDevice { device: format!("cuda:{}", gpu.ordinal), why: why.into() });
            }
        }
        if !codec.is_blocks() {
            // Compiled before anything is written.
            self.gpus.iter().try_for_each(|gpu| gpu.groups().map(|_| ()).map_err(|fault| gpu.fault(fault)))?;
        }
        Ok(())
    }

    fn lane_len(&self, size: &LaneSize) -> u64 {
        SlotSize::from(size).total()
    }

    fn open_lane(&self, device: usize, size: &LaneSize) -> Result<Box<dyn Lane>, super::Fault> {
        let gpu = &self.gpus[device];
        if u32::try_from(size.source).is_err() {
            let why =
                format!("its kernels count with 32 bits, and rows of {} bytes are too long for them", size.source);
            return Err(super::Fault { device: gpu.to_string(), why: why.into(), is_out_of_memory: false });
        }
        let slot = Slot::new(gpu, size.into()).map_err(|fault| gpu.fault(fault))?;
        Ok(Box::new(slot))
    }
}

/// A GPU that is ready to quantize.
struct Gpu {
    ordinal: usize,
    name: String,
    version: i32,
    functions: [[Function; 3]; 2],
    absmax: Function,
    sum: Function,
    nf4: DeviceBuffer,
    fp4: DeviceBuffer,
    dynamic_map: DeviceBuffer,
    groups: OnceLock<GroupModule>,
    _module: Module,
    context: Arc<Context>,
}

/// Why there is no GPU to be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
enum Unusable {
    /// The driver's library can't be loaded.
    #[error("no NVIDIA driver is installed (libcuda.so.1 can't be loaded)")]
    NoDriver,
    /// The driver is too old.
    #[error("the NVIDIA driver serves CUDA {}, and 12.0 is needed: install driver 525 or later", Version(*found))]
    OldDriver {
        /// The CUDA version it serves, as major · 1000 + minor · 10.
        found: i32,
    },
    /// The driver finds no GPU.
    #[error("the NVIDIA driver finds no GPU")]
    NoGpu,
    /// There is no GPU of that number.
    #[error("cuda:{ordinal}: there is no such GPU; {count} found, numbered from 0")]
    NoSuchGpu {
        /// The number asked for.
        ordinal: usize,
        /// How many there are.
        count: usize,
    },
    /// The GPU is too old.
    #[error("{name} has compute capability {}.{}, and 7.5 (Turing) is the oldest that is served", found.0, found.1)]
    OldGpu {
        /// The GPU's name.
        name: String,
        /// Its compute capability.
        found: (i32, i32),
    },
    /// The GPU's memory is taken by others.
    #[error("{name} has {} of memory free, and {} are asked for", crate::units::Bytes(*free), crate::units::Bytes(*needed))]
    LittleMemory {
        /// The GPU's name.
        name: String,
        /// Bytes free.
        free: u64,
        /// Bytes asked for.
        needed: u64,
    },
    /// The driver failed.
    #[error(transparent)]
    Fault(#[from] Fault),
}

/// A CUDA version as people write it.
struct Version(i32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0 / 1000, self.0 % 1000 / 10)
    }
}

/// The first GPU that can be used and has so much memory free; or why the first can't.
fn first_usable(needed: u64) -> Result<Arc<Gpu>, Unusable> {
    let open = |ordinal| {
        let gpu = Gpu::open(ordinal)?;
        match gpu.free_memory()? {
            free if free < needed => Err(Unusable::LittleMemory { name: gpu.name.clone(), free, needed }),
            _ => Ok(gpu),
        }
    };
    let (_, count) = start()?;
    let mut all = (0..count).map(open);
    let first = all.next().unwrap_or(Err(Unusable::NoGpu));
    first.or_else(|why| all.find_map(Result::ok).ok_or(why))
}

/// Starts the driver; returns the CUDA version it serves, and how many GPUs there are.
fn start() -> Result<(i32, usize), Unusable> {
    if !driver::is_present() {
        return Err(Unusable::NoDriver);
    }
    /// The driver's word for a machine without a GPU.
    const NO_DEVICE: u32 = 100;
    let version = match driver::init() {
        Err(Fault { code: NO_DEVICE, .. }) => return Err(Unusable::NoGpu),
        other => other?,
    };
    if version < MIN_VERSION {
        return Err(Unusable::OldDriver { found: version });
    }
    match driver::device_count()? {
        0 => Err(Unusable::NoGpu),
        count => Ok((version, count)),
    }
}

impl Gpu {
    /// The GPU with this number, counted from 0 as the driver does; has the driver compile the kernels.
    ///
    /// # Errors
    /// When there is no driver or GPU, or it can't be used.
    fn open(ordinal: usize) -> Result<Arc<Gpu>, Unusable> {
        let (version, count) = start()?;
        if ordinal >= count {
            return Err(Unusable::NoSuchGpu { ordinal, count });
        }
        let context = Context::new(ordinal)?;
        let (name, capability) = (context.name()?, context.compute_capability()?);
        if capability < MIN_CAPABILITY {
            return Err(Unusable::OldGpu { name, found: capability });
        }
        let module = Module::load(&context, &CString::new(PTX).unwrap_or_default())?;
        let of_format = |format: &str| -> Result<[Function; 3], Fault> {
            let function = |dtype: &str| module.function(&format!("quantize_{format}_{dtype}"));
            Ok([function("bf16")?, function("f16")?, function("f32")?])
        };
        let table = |codebook: &Codebook| DeviceBuffer::with_words(&context, &codebook_table(codebook));
        Ok(Arc::new(Gpu {
            ordinal,
            name,
            version,
            functions: [of_format("nf4")?, of_format("fp4")?],
            absmax: module.function("quantize_absmax")?,
            sum: module.function("sum_figures")?,
            nf4: table(&nf4::CODEBOOK)?,
            fp4: table(&fp4::CODEBOOK)?,
            dynamic_map: DeviceBuffer::with_words(&context, &dynamic_map_table())?,
            groups: OnceLock::new(),
            _module: module,
            context,
        }))
    }

    /// Bytes of its memory that are free.
    fn free_memory(&self) -> Result<u64, Fault> {
        Ok(self.context.memory()?.0)
    }

    /// A fault of this GPU.
    fn fault(&self, fault: Fault) -> super::Fault {
        let is_out_of_memory = fault.is_out_of_memory();
        super::Fault { device: self.to_string(), why: fault.into(), is_out_of_memory }
    }

    fn quantize_function(&self, kernel: BlockKernel, dtype: FloatDtype) -> Function {
        of_dtype(&self.functions[kernel as usize], dtype)
    }

    /// The kernels for groups, which the driver compiles unless it has.
    fn groups(&self) -> Result<&GroupModule, Fault> {
        if let Some(groups) = self.groups.get() {
            return Ok(groups);
        }
        let loaded = GroupModule::load(&self.context)?;
        Ok(self.groups.get_or_init(|| loaded))
    }

    fn absmax_function(&self) -> Function {
        self.absmax
    }

    fn sum_function(&self) -> Function {
        self.sum
    }

    fn table(&self, kernel: BlockKernel) -> &DeviceBuffer {
        match kernel {
            BlockKernel::Nf4 => &self.nf4,
            BlockKernel::Fp4 => &self.fp4,
        }
    }

    fn dynamic_map(&self) -> &DeviceBuffer {
        &self.dynamic_map
    }
}

/// The dtype's kernel of three.
fn of_dtype([bf16, f16, f32]: &[Function; 3], dtype: FloatDtype) -> Function {
    match dtype {
        FloatDtype::Bfloat16 => *bf16,
        FloatDtype::Float16 => *f16,
        FloatDtype::Float32 => *f32,
    }
}

/// The dtype in kernels' names.
fn dtype_name(dtype: FloatDtype) -> &'static str {
    match dtype {
        FloatDtype::Bfloat16 => "bf16",
        FloatDtype::Float16 => "f16",
        FloatDtype::Float32 => "f32",
    }
}

/// As `cuda:0 (NVIDIA H200)`.
impl fmt::Display for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cuda:{} ({})", self.ordinal, self.name)
    }
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}
