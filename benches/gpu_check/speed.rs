//! Kernels against the device's own copy, and the link.
//!
//! All times are the device's own, between events; the best of several runs, after one that warms up.

use std::ffi::{CString, c_void};

use cudarc::driver::result::{self, DriverError, event, module, stream};
use cudarc::driver::sys;
use prequant::format::{FP4, NF4};
use prequant::kernel::cuda::{PTX, THREADS, codebook_table, thread_blocks};

use super::Report;

/// Of what the device's copy moves in a second, a kernel must move this much.
const KERNEL_BAR: f64 = 0.7;

const RUNS: usize = 10;

/// The GPU, with a stream and two events.
struct Timer {
    stream: sys::CUstream,
    start: sys::CUevent,
    end: sys::CUevent,
}

impl Timer {
    /// The least time of `work` in seconds.
    ///
    /// # Safety
    /// What `work` puts on the stream must be sound.
    unsafe fn least(&self, work: impl Fn(sys::CUstream) -> Result<(), DriverError>) -> Result<f64, DriverError> {
        let mut least = f64::INFINITY;
        for run in 0..=RUNS {
            // SAFETY: stream and events live to the end of the process; the rest is the caller's promise.
            let milliseconds = unsafe {
                event::record(self.start, self.stream)?;
                work(self.stream)?;
                event::record(self.end, self.stream)?;
                event::synchronize(self.end)?;
                event::elapsed(self.start, self.end)?
            };
            if run > 0 {
                least = least.min(f64::from(milliseconds) / 1e3);
            }
        }
        Ok(least)
    }
}

/// Times every kernel on `len` bytes of weights; returns the link's bytes a second, host to device.
pub fn check(ordinal: usize, len: usize, report_only: bool, report: &mut Report) -> Result<f64, DriverError> {
    // SAFETY: every address is of a buffer as long as is copied or as the kernel's arguments say; all of it lives until
    // the end of the process.
    unsafe {
        result::ctx::set_current(result::primary_ctx::retain(result::device::get(ordinal as i32)?)?)?;
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        let stream = stream::create(stream::StreamKind::NonBlocking)?;
        let timer = Timer { stream, start: event::create(flags)?, end: event::create(flags)? };

        let host = std::slice::from_raw_parts_mut(result::malloc_host(len, 0)?.cast::<u8>(), len);
        // Small numbers, whatever their dtype: exponents around that of 0.01.
        let mut state = 1u32;
        for pair in host.chunks_exact_mut(2) {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            pair.copy_from_slice(&(0x3c00 | (state >> 16 & 0x83ff) as u16).to_le_bytes());
        }
        let source = result::malloc_sync(len)?;
        let seconds = timer.least(|stream| result::memcpy_htod_async(source, host, stream))?;
        let link = len as f64 / seconds;
        report.line(&format!("link: {:.1} GB/s from pinned memory to the device", link / 1e9));

        report.line("kernels, against a copy on the device of as many bytes (read and written, together):");
        let image = CString::new(PTX).unwrap_or_default();
        let kernels = module::load_data(image.as_ptr().cast())?;
        for (format, codebook) in [("nf4", &NF4), ("fp4", &FP4)] {
            let table = codebook_table(codebook);
            let on_device = result::malloc_sync(size_of_val(&table[..]))?;
            result::memcpy_htod_sync(on_device, &table)?;
            for (dtype, size) in [("bf16", 2), ("f16", 2), ("f32", 4)] {
                let name = format!("quantize_{format}_{dtype}");
                let function = module::get_function(kernels, CString::new(&name[..]).unwrap_or_default())?;
                for block_size in [32usize, 64, 256, 4096] {
                    let elements = len / size / 4096 * 4096;
                    let blocks = elements / block_size;
                    let moved = elements * size + elements / 2 + 16 * blocks;
                    let results = result::malloc_sync(elements / 2 + 16 * blocks)?;
                    let figure = |i: usize| results + (i * 4 * blocks) as u64;
                    let addresses = [source, on_device, figure(4), figure(0), figure(1), figure(2), figure(3)];
                    let numbers = [elements as u32, block_size as u32];
                    let quantize = |stream| {
                        let address = |i: usize| (&raw const addresses[i]).cast_mut().cast::<c_void>();
                        let number = |i: usize| (&raw const numbers[i]).cast_mut().cast::<c_void>();
                        let mut arguments = vec![address(0), number(0), number(1)];
                        arguments.extend((1..7).map(address));
                        let grid = thread_blocks(blocks);
                        result::launch_kernel(function, (grid, 1, 1), (THREADS, 1, 1), 0, stream, &mut arguments)
                    };
                    let kernel = timer.least(quantize)?;
                    // A copy of half as many bytes moves them twice.
                    let target = result::malloc_sync(moved / 2)?;
                    let copy = timer.least(|stream| result::memcpy_dtod_async(target, source, moved / 2, stream))?;
                    result::free_sync(target)?;
                    result::free_sync(results)?;
                    let share = copy / kernel;
                    // The bar is that of the default block size.
                    let holds = share >= KERNEL_BAR || block_size != 64 || report_only;
                    let rate = elements as f64 * size as f64 / kernel / 1e9;
                    let line = format!(
                        "  {name:18} block {block_size:4}: {:8.1} us, {rate:7.1} GB/s of weights, {:3.0} % of the copy",
                        kernel * 1e6,
                        100.0 * share
                    );
                    report.check(holds, &line);
                }
            }
        }
        result::free_sync(source)?;
        result::free_host(host.as_mut_ptr().cast())?;
        Ok(link)
    }
}
