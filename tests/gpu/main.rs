//! `--device cuda` without a GPU: its kernels in the interpreter of tests/ptx-interpreter, conversions on the driver of
//! tests/fake-cuda.

#[path = "../support/mod.rs"]
mod support;

mod block_faults;
mod blocks;
// The driver is found by LD_LIBRARY_PATH, as on Linux only.
#[cfg(target_os = "linux")]
mod convert;
mod driver;
mod group_faults;
mod groups;
mod launch;
mod launch_groups;
mod mutations;
mod sums;
