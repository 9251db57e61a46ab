//! Kernels against the device's own copy, and the link.
//!
//! All times are the device's own, between events; the best of several runs, after one that warms up.

use std::ffi::{CString, c_void};

use cudarc::driver::result::{self, DriverError, event, module, stream};
use cudarc::driver::sys;
use prequant::FloatDtype;
use prequant::internal::backend::cuda::{
    GROUPS_PTX, GroupKernel, PTX, THREADS, codebook_table, tensor_factor, thread_blocks,
};
use prequant::internal::format::{Coding, fp4, nf4};

use super::{Report, codings};

/// Of what the device's copy moves in a second, NF4's and FP4's kernels must move this much.
const KERNEL_BAR: f64 = 0.7;

const RUNS: usize = 10;

const DTYPES: [(&str, FloatDtype); 3] =
    [("bf16", FloatDtype::Bfloat16), ("f16", FloatDtype::Float16), ("f32", FloatDtype::Float32)];

/// The GPU, with a stream and two events.
struct Timer {
    stream: sys::CUstream,
    start: sys::CUevent,
    end: sys::CUevent,
}

/// A kernel's parameter.
#[derive(Clone, Copy)]
enum Parameter {
    /// The weights.
    Source,
    /// So many bytes into the results.
    Results(usize),
    Address(u64),
    U32(u32),
    F32(f32),
}

/// A kernel to time.
struct Case {
    name: String,
    /// In a block or a group.
    block: usize,
    function: sys::CUfunction,
    grid: u32,
    parameters: Vec<Parameter>,
    /// Bytes of weights.
    read: usize,
    /// Bytes of results.
    written: usize,
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

    /// Times a kernel; gives its line, and its rate over that of a copy.
    ///
    /// # Safety
    /// The parameters must be the kernel's, `source` as long as is read, and at least as long as is written.
    unsafe fn time(&self, source: sys::CUdeviceptr, case: &Case) -> Result<(String, f64), DriverError> {
        let moved = case.read + case.written;
        // SAFETY: the results are as long as the case says; the rest is the caller's promise.
        let (kernel, copy) = unsafe {
            let results = result::malloc_sync(case.written)?;
            let mut words: Vec<u64> = case
                .parameters
                .iter()
                .map(|parameter| match *parameter {
                    Parameter::Source => source,
                    Parameter::Results(at) => results + at as u64,
                    Parameter::Address(address) => address,
                    Parameter::U32(number) => u64::from(number),
                    Parameter::F32(number) => u64::from(number.to_bits()),
                })
                .collect();
            // The driver reads as many bytes as the parameter has, and numbers are little-endian.
            let pointers: Vec<*mut c_void> = words.iter_mut().map(|word| std::ptr::from_mut(word).cast()).collect();
            let kernel = self.least(|stream| {
                let (grid, threads) = ((case.grid, 1, 1), (THREADS, 1, 1));
                result::launch_kernel(case.function, grid, threads, 0, stream, &mut pointers.clone())
            })?;
            // A copy of half as many bytes moves them twice.
            let target = result::malloc_sync(moved / 2)?;
            let copy = self.least(|stream| result::memcpy_dtod_async(target, source, moved / 2, stream))?;
            result::free_sync(target)?;
            result::free_sync(results)?;
            (kernel, copy)
        };
        let (rate, share) = (case.read as f64 / kernel / 1e9, copy / kernel);
        let line = format!(
            "  {:28} block {:4}: {:8.1} us, {rate:7.1} GB/s of weights, {:3.0} % of the copy",
            case.name,
            case.block,
            kernel * 1e6,
            100.0 * share
        );
        Ok((line, share))
    }
}

/// Times every kernel on `len` bytes of weights; returns the link's bytes per second, host to device.
pub fn check(ordinal: usize, len: usize, report_only: bool, report: &mut Report) -> Result<f64, DriverError> {
    // SAFETY: every address is of a buffer as long as is copied or as the kernel's parameters say; all of it lives until
    // the end of the process.
    unsafe {
        make_current(ordinal)?;
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
        for case in block_cases(len)? {
            let (line, share) = timer.time(source, &case)?;
            // The bar is that of the default block size.
            report.check(share >= KERNEL_BAR || case.block != 64 || report_only, &line);
        }
        report.line("kernels for groups, likewise:");
        for case in group_cases(len)? {
            report.line(&timer.time(source, &case)?.0);
        }
        result::free_sync(source)?;
        result::free_host(host.as_mut_ptr().cast())?;
        Ok(link)
    }
}

/// Has the calling thread work with a GPU's primary context, which is kept to the end of the process.
fn make_current(ordinal: usize) -> Result<(), DriverError> {
    // SAFETY: the device comes from the driver, and what is retained is never released.
    unsafe { result::ctx::set_current(result::primary_ctx::retain(result::device::get(ordinal as i32)?)?) }
}

/// Bytes of a GPU's memory that are free.
pub fn free_memory(ordinal: usize) -> Result<u64, DriverError> {
    make_current(ordinal)?;
    Ok(result::mem_get_info()?.0 as u64)
}

fn load(ptx: &str) -> Result<sys::CUmodule, DriverError> {
    let image = CString::new(ptx).unwrap_or_default();
    // SAFETY: a PTX image is text that ends in a zero byte.
    unsafe { module::load_data(image.as_ptr().cast()) }
}

fn function(module: sys::CUmodule, name: &str) -> Result<sys::CUfunction, DriverError> {
    // SAFETY: the module is loaded, and never unloaded.
    unsafe { module::get_function(module, CString::new(name).unwrap_or_default()) }
}

/// NF4's and FP4's kernels on `len` bytes.
fn block_cases(len: usize) -> Result<Vec<Case>, DriverError> {
    use Parameter::{Address, Results, Source, U32};
    let module = load(PTX)?;
    let mut cases = Vec::new();
    for (format, codebook) in [("nf4", &nf4::CODEBOOK), ("fp4", &fp4::CODEBOOK)] {
        let words = codebook_table(codebook);
        // SAFETY: the table is as long as what is copied to it.
        let table = unsafe {
            let table = result::malloc_sync(size_of_val(&words[..]))?;
            result::memcpy_htod_sync(table, &words)?;
            table
        };
        for (name, dtype) in DTYPES {
            let name = format!("quantize_{format}_{name}");
            for block in [32usize, 64, 256, 4096] {
                let elements = len / dtype.size() / 4096 * 4096;
                let blocks = elements / block;
                let figure = |i: usize| Results(i * 4 * blocks);
                let (count, size) = (U32(elements as u32), U32(block as u32));
                let (packed, absmax) = (figure(4), figure(0));
                cases.push(Case {
                    name: name.clone(),
                    block,
                    function: function(module, &name)?,
                    grid: thread_blocks(blocks),
                    parameters: vec![
                        Source,
                        count,
                        size,
                        Address(table),
                        packed,
                        absmax,
                        figure(1),
                        figure(2),
                        figure(3),
                    ],
                    read: elements * dtype.size(),
                    written: elements / 2 + 16 * blocks,
                });
            }
        }
    }
    Ok(cases)
}

/// The kernels for groups on `len` bytes, in rows of 4096 columns.
fn group_cases(len: usize) -> Result<Vec<Case>, DriverError> {
    use Parameter::{F32, Results, Source, U32};
    const COLUMNS: usize = 4096;
    let module = load(GROUPS_PTX)?;
    let mut cases = Vec::new();
    for (scheme, group) in [
        (codings::INT4, 32),
        (codings::INT4, 128),
        (codings::INT4, COLUMNS),
        (codings::INT4_ASYM, 128),
        (codings::INT4_ASYM, COLUMNS),
        (codings::nvfp4(448.0), 16),
        (codings::nvfp4_modelopt(1.0 / 448.0), 16),
        (codings::MXFP4, 32),
    ] {
        let kernel = GroupKernel::new(Coding { group, ..scheme }, COLUMNS).expect("a kernel of this size");
        for (_, dtype) in DTYPES {
            let elements = len / dtype.size() / COLUMNS * COLUMNS;
            let groups = elements / group;
            let packed = 16 * groups;
            let scales = packed + elements / 2;
            let zero_points = scales + groups * scheme.scale_size(dtype);
            let points = if scheme.has_zero_points() { groups } else { 0 };
            let (count, size) = (U32(groups as u32), U32(group as u32));
            let results = [packed, scales, zero_points, 0].map(Results);
            cases.push(Case {
                name: kernel.name(dtype),
                block: group,
                function: function(module, &kernel.name(dtype))?,
                grid: kernel.thread_blocks(groups),
                parameters: [&[Source, count, size, F32(tensor_factor(scheme))], &results[..]].concat(),
                read: elements * dtype.size(),
                written: zero_points + points,
            });
        }
    }
    Ok(cases)
}
