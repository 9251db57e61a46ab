//! NVIDIA GPUs, through the driver alone.

mod tables;

pub use tables::{codebook_table, dynamic_map_table};

/// The kernels, as every driver of CUDA 11.8 and later takes them; made from kernels.cu by scripts/build-ptx.
pub const PTX: &str = include_str!("kernels.ptx");

/// Threads in a thread block of the `quantize_*` kernels.
pub const THREADS: u32 = 128;

/// Blocks of weights that one of their thread blocks takes.
pub const BLOCKS_PER_THREAD_BLOCK: u32 = 32;
