//! The CUDA driver's objects as Rust values, freed when dropped. All unsafe calls into the driver are here.
//!
//! What the SAFETY comments rest on:
//! - Every handle comes from the driver, belongs to the `Context` beside it, and is destroyed once, on drop. The `Arc` keeps the context
//!   until all that was made in it is gone.
//! - Work that reads or writes buffers is started by [`Stream::run`] alone, which borrows them and returns, or unwinds, only when
//!   no work is under way.

use std::ffi::{CStr, CString, c_void};
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

/// A call into the driver that failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed: {name} ({code}): {text}")]
pub(crate) struct Fault {
    /// The driver's function.
    pub call: &'static str,
    /// The driver's number for what went wrong.
    pub code: u32,
    /// Its name.
    pub name: String,
    /// The driver's words for it.
    pub text: String,
}

impl Fault {
    /// Whether memory ran out, on the device or for pinned buffers.
    pub(crate) fn is_out_of_memory(&self) -> bool {
        self.code == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY as u32
    }
}

/// Adds the call's name to a driver's error.
trait Named<T> {
    fn in_call(self, call: &'static str) -> Result<T, Fault>;
}

impl<T> Named<T> for Result<T, DriverError> {
    fn in_call(self, call: &'static str) -> Result<T, Fault> {
        self.map_err(|error| {
            let text = |text: Result<&CStr, DriverError>| text.map_or("unknown".into(), CStr::to_string_lossy).into();
            Fault { call, code: error.0 as u32, name: text(error.error_name()), text: text(error.error_string()) }
        })
    }
}

/// Whether the driver's library is there. Every other call panics without it.
pub(crate) fn is_present() -> bool {
    // SAFETY: loading the library runs its initializers, which are the driver's own.
    unsafe { sys::is_culib_present() }
}

/// Starts the driver; returns the CUDA version that it serves, as major · 1000 + minor · 10.
pub(crate) fn init() -> Result<i32, Fault> {
    let mut version = 0;
    // SAFETY: writes one i32; needs no initialization.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().in_call("cuDriverGetVersion")?;
    result::init().in_call("cuInit")?;
    Ok(version)
}

/// The number of GPUs.
pub(crate) fn device_count() -> Result<usize, Fault> {
    Ok(result::device::get_count().in_call("cuDeviceGetCount")?.max(0) as usize)
}

/// A GPU's primary context.
#[derive(Debug)]
pub(crate) struct Context {
    device: sys::CUdevice,
    context: sys::CUcontext,
    /// What went wrong first: of a GPU that is lost, every later call fails too.
    fault: OnceLock<Fault>,
}

// SAFETY: the driver's functions may be called from any thread, and a context be current to several.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// That of the GPU with this number; `init` must have been called.
    pub(crate) fn new(ordinal: usize) -> Result<Arc<Context>, Fault> {
        let device = result::device::get(ordinal as i32).in_call("cuDeviceGet")?;
        // SAFETY: the device comes from the driver; what is retained is released on drop.
        let context = unsafe { result::primary_ctx::retain(device) }.in_call("cuDevicePrimaryCtxRetain")?;
        Ok(Arc::new(Context { device, context, fault: OnceLock::new() }))
    }

    /// The GPU's name.
    pub(crate) fn name(&self) -> Result<String, Fault> {
        result::device::get_name(self.device).in_call("cuDeviceGetName")
    }

    /// Major and minor compute capability.
    pub(crate) fn compute_capability(&self) -> Result<(i32, i32), Fault> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        // SAFETY: the device comes from the driver.
        let attribute = |which| unsafe { result::device::get_attribute(self.device, which) };
        Ok((attribute(MAJOR).in_call("cuDeviceGetAttribute")?, attribute(MINOR).in_call("cuDeviceGetAttribute")?))
    }

    /// Bytes of device memory that are free, and all.
    pub(crate) fn memory(&self) -> Result<(u64, u64), Fault> {
        self.make_current()?;
        let (free, total) = result::mem_get_info().in_call("cuMemGetInfo")?;
        Ok((free as u64, total as u64))
    }

    /// Has the calling thread work with this context.
    fn make_current(&self) -> Result<(), Fault> {
        // SAFETY: the context is retained as long as `self` lives.
        let made = unsafe { result::ctx::set_current(self.context) }.in_call("cuCtxSetCurrent");
        made.map_err(|fault| self.first(fault))
    }

    /// The fault that a fault may only be a consequence of. A lack of memory has none.
    fn first(&self, fault: Fault) -> Fault {
        if fault.is_out_of_memory() { fault } else { self.fault.get_or_init(|| fault).clone() }
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: retained once in `new`; everything made in the context holds an `Arc` of it and is gone. A failure
        // leaves nothing to be done.
        let _ = unsafe { result::primary_ctx::release(self.device) };
    }
}

/// Kernels compiled for a GPU.
#[derive(Debug)]
pub(crate) struct Module {
    context: Arc<Context>,
    module: sys::CUmodule,
}

/// A kernel of a [`Module`], which must outlive it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(sys::CUfunction);

// SAFETY: a handle of the driver, whose functions may be called from any thread.
unsafe impl Send for Module {}
// SAFETY: as above; nothing changes a module once it is loaded.
unsafe impl Sync for Module {}
// SAFETY: a handle that is only ever passed to the driver, from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Module {
    /// Has the driver compile `ptx`.
    pub(crate) fn load(context: &Arc<Context>, ptx: &CStr) -> Result<Module, Fault> {
        context.make_current()?;
        // SAFETY: a PTX image is text that ends in a zero byte.
        let module = unsafe { result::module::load_data(ptx.as_ptr().cast()) }.in_call("cuModuleLoadData")?;
        Ok(Module { context: context.clone(), module })
    }

    /// The kernel of that name.
    pub(crate) fn function(&self, name: &str) -> Result<Function, Fault> {
        let name = CString::new(name).unwrap_or_default();
        // SAFETY: the module is loaded.
        let function = unsafe { result::module::get_function(self.module, name) };
        Ok(Function(function.in_call("cuModuleGetFunction")?))
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: loaded in `load`, and unloaded once.
            let _ = unsafe { result::module::unload(self.module) };
        }
    }
}

/// Memory on a GPU.
#[derive(Debug)]
pub(crate) struct DeviceBuffer {
    context: Arc<Context>,
    address: sys::CUdeviceptr,
    len: usize,
}

impl DeviceBuffer {
    /// `len` bytes, at least one; not initialized.
    pub(crate) fn new(context: &Arc<Context>, len: usize) -> Result<DeviceBuffer, Fault> {
        context.make_current()?;
        // SAFETY: freed on drop.
        let address = unsafe { result::malloc_sync(len) }.in_call("cuMemAlloc");
        let address = address.map_err(|fault| context.first(fault))?;
        Ok(DeviceBuffer { context: context.clone(), address, len })
    }

    /// A buffer that holds `words`.
    pub(crate) fn with_words(context: &Arc<Context>, words: &[u32]) -> Result<DeviceBuffer, Fault> {
        let buffer = DeviceBuffer::new(context, size_of_val(words))?;
        // SAFETY: the buffer was made with the words' length, so the copy ends in it; it is over when the call returns.
        unsafe { result::memcpy_htod_sync(buffer.address, words) }.in_call("cuMemcpyHtoD")?;
        Ok(buffer)
    }

    /// The device's address of its first byte.
    pub(crate) fn address(&self) -> u64 {
        self.address
    }

    /// Its length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: allocated in `new`, and freed once; whoever starts work with it waits for its end.
            let _ = unsafe { result::free_sync(self.address) };
        }
    }
}

/// Memory of this machine that stays where it is, so that a GPU can read and write it itself.
#[derive(Debug)]
pub(crate) struct PinnedBuffer {
    context: Arc<Context>,
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: plain memory that nothing else points to; the driver frees it from any thread.
unsafe impl Send for PinnedBuffer {}

impl PinnedBuffer {
    /// `len` zeros, aligned to a page.
    pub(crate) fn new(context: &Arc<Context>, len: usize) -> Result<PinnedBuffer, Fault> {
        context.make_current()?;
        // SAFETY: freed on drop. The flags ask for portable (1), cached memory: the CPU reads results back from it.
        let start = unsafe { result::malloc_host(len, 1) }.in_call("cuMemHostAlloc");
        let start = start.map_err(|fault| context.first(fault))?;
        let Some(start) = NonNull::new(start.cast::<u8>()) else {
            let name = "CUDA_ERROR_OUT_OF_MEMORY".to_owned();
            return Err(Fault { call: "cuMemHostAlloc", code: 2, name, text: "it gave no address".to_owned() });
        };
        // SAFETY: the driver gave `len` bytes from `start` on, to us alone.
        unsafe { start.write_bytes(0, len) };
        Ok(PinnedBuffer { context: context.clone(), start, len })
    }

    /// Its bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: `len` initialized bytes, borrowed as `self` is; `Stream::run` returns only when no copy is under way.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

impl Drop for PinnedBuffer {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: allocated in `new`, and freed once.
            let _ = unsafe { result::free_host(self.start.as_ptr().cast()) };
        }
    }
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// An address on the device.
    Address(u64),
    /// An unsigned integer.
    U32(u32),
    /// A number.
    F32(f32),
}

/// A kernel, its grid and its arguments.
pub(crate) struct Launch<'a> {
    /// The kernel.
    pub function: Function,
    /// Thread blocks.
    pub grid: u32,
    /// Threads in each.
    pub threads: u32,
    /// What it is given, in its parameters' order and types.
    pub arguments: &'a [Argument],
}

/// Bytes for a device, and where they go.
pub(crate) struct Upload<'a> {
    /// In a [`PinnedBuffer`].
    pub bytes: &'a [u8],
    /// The device's buffer.
    pub to: &'a mut DeviceBuffer,
    /// Their place in it.
    pub at: usize,
}

/// Bytes of a device that are wanted here.
pub(crate) struct Download<'a> {
    /// The device's buffer.
    pub from: &'a DeviceBuffer,
    /// A [`PinnedBuffer`]'s.
    pub bytes: &'a mut [u8],
    /// Where they lie, in both; empty if there is nothing more.
    pub pieces: [Range<usize>; 2],
}

/// Work done by a GPU in order, beside other streams; and the event that tells of its end.
#[derive(Debug)]
pub(crate) struct Stream {
    context: Arc<Context>,
    stream: sys::CUstream,
    done: sys::CUevent,
}

// SAFETY: handles of the driver, whose functions may be called from any thread.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that waits for no other.
    pub(crate) fn new(context: &Arc<Context>) -> Result<Stream, Fault> {
        context.make_current()?;
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).in_call("cuStreamCreate");
        let stream = stream.map_err(|fault| context.first(fault))?;
        // A thread that waits sleeps: there are files to hash meanwhile.
        let flags =
            sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as u32 | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        let mut done = std::ptr::null_mut();
        // SAFETY: writes one handle, which is destroyed on drop.
        let created = unsafe { sys::cuEventCreate(&mut done, flags) }.result().in_call("cuEventCreate");
        let stream = Stream { context: context.clone(), stream, done };
        created.map_err(|fault| context.first(fault))?;
        Ok(stream)
    }

    /// Copies `source` to the device, unless there is nothing of it; runs kernels one after the other, copies their results back, and
    /// waits for the end.
    ///
    /// # Safety
    /// The functions' modules must be loaded in this context, and the arguments be what the kernels take. All that the kernels read or
    /// write must lie in buffers that live and that nothing else uses meanwhile.
    ///
    /// # Panics
    /// Before anything is started, where a copy would pass a buffer's end, or a buffer is of another context.
    pub(crate) unsafe fn run(
        &self,
        source: Upload<'_>,
        launches: &[Launch<'_>],
        results: Download<'_>,
    ) -> Result<(), Fault> {
        let room = results.from.len().min(results.bytes.len());
        let fits = source.bytes.len() <= source.to.len().saturating_sub(source.at)
            && results.pieces.iter().all(|piece| piece.end <= room);
        assert!(fits, "copies past a buffer's end");
        let is_here = |buffer: &DeviceBuffer| Arc::ptr_eq(&buffer.context, &self.context);
        assert!(is_here(source.to) && is_here(results.from), "buffers of another GPU");
        self.context.make_current()?;
        // Whatever is started uses the buffers until it ends: they are waited for even if a call of the driver's panics.
        let under_way = UnderWay(self);
        // SAFETY: all copies are within their buffers, as checked, which are borrowed until the work is waited for; the launches
        // are the caller's promise.
        let started = unsafe { self.start(&source, launches, results) };
        let started = started.map_err(|fault| self.context.first(fault));
        let ended = under_way.wait();
        started.and(ended)
    }

    /// Queues copies and kernels; returns without waiting for them, and with an error once one can't be queued.
    ///
    /// # Safety
    /// As [`Stream::run`]; the copies must be within their buffers, which must not be touched until the stream is waited for.
    unsafe fn start(&self, source: &Upload<'_>, launches: &[Launch<'_>], results: Download<'_>) -> Result<(), Fault> {
        if !source.bytes.is_empty() {
            let to = source.to.address + source.at as u64;
            // SAFETY: the callers' promise: `bytes` fit into the buffer from `at` on, and both are left alone.
            unsafe { result::memcpy_htod_async(to, source.bytes, self.stream) }.in_call("cuMemcpyHtoDAsync")?;
        }
        for launch in launches {
            // SAFETY: the callers' promise.
            unsafe { self.launch(launch)? };
        }
        for piece in results.pieces.into_iter().filter(|piece| !piece.is_empty()) {
            let (from, to) = (results.from.address + piece.start as u64, &mut results.bytes[piece]);
            // SAFETY: the callers' promise: the piece lies in both buffers, and both are left alone.
            unsafe { result::memcpy_dtoh_async(to, from, self.stream) }.in_call("cuMemcpyDtoHAsync")?;
        }
        Ok(())
    }

    /// Queues a kernel.
    ///
    /// # Safety
    /// As [`Stream::run`].
    unsafe fn launch(&self, launch: &Launch<'_>) -> Result<(), Fault> {
        let mut values = launch.arguments.to_vec();
        let pointer = |value: &mut Argument| match value {
            Argument::Address(x) => std::ptr::from_mut(x).cast::<c_void>(),
            Argument::U32(x) => std::ptr::from_mut(x).cast(),
            Argument::F32(x) => std::ptr::from_mut(x).cast(),
        };
        let mut pointers: Vec<*mut c_void> = values.iter_mut().map(pointer).collect();
        let (grid, threads) = ((launch.grid, 1, 1), (launch.threads, 1, 1));
        // SAFETY: the function and its arguments are the callers' promise. Each pointer is to the value inside an element of `values`,
        // which lives longer than the call, and the driver copies what they point to before it returns.
        let launched =
            unsafe { result::launch_kernel(launch.function.0, grid, threads, 0, self.stream, &mut pointers) };
        launched.in_call("cuLaunchKernel")
    }

    /// Waits for all that was started.
    fn wait(&self) -> Result<(), Fault> {
        // SAFETY: event and stream live as long as `self`, and are of this context, which the thread works with.
        let waited = unsafe {
            let recorded = result::event::record(self.done, self.stream).in_call("cuEventRecord");
            recorded.and_then(|()| result::event::synchronize(self.done).in_call("cuEventSynchronize"))
        };
        waited.map_err(|fault| {
            let fault = self.context.first(fault);
            // The work may still go on; if this fails too, the GPU is lost and does none.
            // SAFETY: the stream lives as long as `self`.
            let _ = unsafe { result::stream::synchronize(self.stream) };
            fault
        })
    }
}

/// Work that was started and not waited for.
struct UnderWay<'s>(&'s Stream);

impl UnderWay<'_> {
    fn wait(self) -> Result<(), Fault> {
        let ended = self.0.wait();
        // Where waiting itself panics, it is tried again.
        std::mem::forget(self);
        ended
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        // SAFETY: the stream lives as long as the borrow of it.
        let _ = unsafe { result::stream::synchronize(self.0.stream) };
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.context.make_current().is_ok() {
            // SAFETY: made in `new`, destroyed once; the event is null if it could not be made.
            unsafe {
                if !self.done.is_null() {
                    let _ = result::event::destroy(self.done);
                }
                let _ = result::stream::destroy(self.stream);
            }
        }
    }
}
