//! NVIDIA's driver, as far as prequant calls it, on a machine that has none: its functions over a PTX interpreter.
//!
//! Tests put the shared library into a folder of its own, named `libcuda.so.1`, and that folder on a child process's
//! LD_LIBRARY_PATH. See [`settings`] for what it can be made to do.
#![allow(non_snake_case, reason = "the driver's names")]
#![allow(
    clippy::missing_safety_doc,
    reason = "as NVIDIA documents them: pointers are valid for what is read or written"
)]

mod fake;
mod settings;

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use fake::{Code, Fake, INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, Work};
use settings::Settings;

fn fake() -> MutexGuard<'static, Fake> {
    static FAKE: LazyLock<Mutex<Fake>> = LazyLock::new(|| Mutex::new(Fake::new(Settings::from_environment())));
    FAKE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One call: counted, perhaps made to fail, and its result as a number.
fn call(name: &'static str, body: impl FnOnce(&mut Fake) -> Result<(), Code>) -> Code {
    let mut fake = fake();
    match fake.enter(name).and_then(|()| body(&mut fake)) {
        Ok(()) => 0,
        Err(code) => code,
    }
}

/// Hands a value out through a pointer.
///
/// # Safety
/// `to` must be null or point to a `T` that may be written.
unsafe fn put<T>(to: *mut T, value: T) -> Result<(), Code> {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: the caller's promise.
    unsafe { to.write(value) };
    Ok(())
}

macro_rules! driver_functions {
    ($($symbol:ident = $name:literal ($($argument:ident: $type:ty),*) |$fake:ident| $body:expr)*) => {$(
        #[unsafe(no_mangle)]
        #[allow(unused_unsafe, reason = "some of them take no pointers")]
        pub unsafe extern "C" fn $symbol($($argument: $type),*) -> Code {
            // SAFETY: pointers are as NVIDIA documents them for this function.
            call($name, |$fake| unsafe { $body })
        }
    )*};
}

driver_functions! {
    cuDriverGetVersion = "cuDriverGetVersion" (version: *mut c_int) |fake| put(version, fake.settings.version)
    cuInit = "cuInit" (_flags: c_uint) |fake| if fake.settings.devices == 0 { Err(NO_DEVICE) } else { Ok(()) }
    cuDeviceGetCount = "cuDeviceGetCount" (count: *mut c_int) |fake| put(count, fake.settings.devices as c_int)
    cuDeviceGet = "cuDeviceGet" (device: *mut c_int, ordinal: c_int) |fake|
        if (0..fake.settings.devices as c_int).contains(&ordinal) { put(device, ordinal) } else { Err(INVALID_DEVICE) }
    cuDeviceGetName = "cuDeviceGetName" (name: *mut c_char, len: c_int, _device: c_int) |_fake| {
        let text = c"Fake GPU".to_bytes_with_nul();
        if (len as usize) < text.len() {
            return Err(INVALID_VALUE);
        }
        std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), text.len());
        Ok(())
    }
    cuDeviceGetAttribute = "cuDeviceGetAttribute" (value: *mut c_int, attribute: c_int, _device: c_int) |fake|
        match attribute {
            75 => put(value, fake.settings.capability / 10),
            76 => put(value, fake.settings.capability % 10),
            _ => Err(INVALID_VALUE),
        }
    cuDevicePrimaryCtxRetain = "cuDevicePrimaryCtxRetain" (context: *mut usize, device: c_int) |fake| {
        fake.retain(device as usize)?;
        put(context, device as usize + 1)
    }
    cuDevicePrimaryCtxRelease_v2 = "cuDevicePrimaryCtxRelease" (device: c_int) |fake| fake.release(device as usize)
    cuCtxSetCurrent = "cuCtxSetCurrent" (context: usize) |fake| fake.set_current(context.wrapping_sub(1))
    cuMemGetInfo_v2 = "cuMemGetInfo" (free: *mut usize, total: *mut usize) |fake| {
        let (free_bytes, all) = fake.memory()?;
        put(free, free_bytes)?;
        put(total, all)
    }
    cuModuleLoadData = "cuModuleLoadData" (module: *mut usize, image: *const c_char) |fake| {
        let ptx = CStr::from_ptr(image).to_str().map_err(|_| INVALID_VALUE)?;
        put(module, fake.load_module(ptx)?)
    }
    cuModuleUnload = "cuModuleUnload" (module: usize) |fake| fake.unload_module(module)
    cuModuleGetFunction = "cuModuleGetFunction" (function: *mut usize, module: usize, name: *const c_char) |fake| {
        let name = CStr::from_ptr(name).to_str().map_err(|_| INVALID_VALUE)?;
        put(function, fake.function(module, name)?)
    }
    cuMemAlloc_v2 = "cuMemAlloc" (address: *mut u64, len: usize) |fake| put(address, fake.allocate(len)?)
    cuMemFree_v2 = "cuMemFree" (address: u64) |fake| fake.free(address)
    cuMemHostAlloc = "cuMemHostAlloc" (start: *mut usize, len: usize, _flags: c_uint) |fake| put(start, fake.pin(len)?)
    cuMemFreeHost = "cuMemFreeHost" (start: usize) |fake| fake.unpin(start)
    cuMemcpyHtoD_v2 = "cuMemcpyHtoD" (to: u64, from: *const u8, len: usize) |fake|
        fake.upload(to, std::slice::from_raw_parts(from, len))
    cuMemcpyHtoDAsync_v2 = "cuMemcpyHtoDAsync" (to: u64, from: usize, len: usize, stream: usize) |fake|
        fake.queue(stream, Work::ToDevice { to, from, len })
    cuMemcpyDtoHAsync_v2 = "cuMemcpyDtoHAsync" (to: usize, from: u64, len: usize, stream: usize) |fake|
        fake.queue(stream, Work::ToHost { to, from, len })
    cuMemcpyDtoDAsync_v2 = "cuMemcpyDtoDAsync" (to: u64, from: u64, len: usize, stream: usize) |fake|
        fake.queue(stream, Work::Within { to, from, len })
    cuLaunchKernel = "cuLaunchKernel" (
        function: usize, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
        block_z: c_uint, _shared: c_uint, stream: usize, arguments: *const *const u8, _extra: *const c_void
    ) |fake| {
        let read = |(i, size): (usize, usize)| std::slice::from_raw_parts(*arguments.add(i), size).to_vec();
        let params = fake.params(function)?.into_iter().enumerate().map(read).collect();
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        fake.queue(stream, Work::Launch { function, grid, block, params })
    }
    cuStreamCreate = "cuStreamCreate" (stream: *mut usize, _flags: c_uint) |fake| put(stream, fake.create_stream()?)
    cuStreamSynchronize = "cuStreamSynchronize" (stream: usize) |fake| fake.synchronize(stream)
    cuStreamDestroy_v2 = "cuStreamDestroy" (stream: usize) |fake| fake.destroy_stream(stream)
    cuEventCreate = "cuEventCreate" (event: *mut usize, _flags: c_uint) |fake| put(event, fake.create_event()?)
    cuEventRecord = "cuEventRecord" (event: usize, stream: usize) |fake| fake.record(event, stream)
    cuEventSynchronize = "cuEventSynchronize" (event: usize) |fake| fake.wait_for(event)
    cuEventDestroy_v2 = "cuEventDestroy" (event: usize) |fake| fake.destroy_event(event)
    cuEventElapsedTime = "cuEventElapsedTime" (milliseconds: *mut f32, start: usize, end: usize) |fake| {
        let (start, end) = (fake.reached(start)?, fake.reached(end)?);
        put(milliseconds, end.duration_since(start).as_secs_f32() * 1e3)
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorName(code: Code, name: *mut *const c_char) -> Code {
    let text = match code {
        2 => c"CUDA_ERROR_OUT_OF_MEMORY",
        100 => c"CUDA_ERROR_NO_DEVICE",
        214 => c"CUDA_ERROR_ECC_UNCORRECTABLE",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        719 => c"CUDA_ERROR_LAUNCH_FAILED",
        _ => c"CUDA_ERROR_UNKNOWN",
    };
    // SAFETY: a pointer to write to, as NVIDIA documents it.
    unsafe { put(name, text.as_ptr()) }.map_or_else(|code| code, |()| 0)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(_code: Code, text: *mut *const c_char) -> Code {
    // SAFETY: as above.
    unsafe { put(text, c"as it was told to".as_ptr()) }.map_or_else(|code| code, |()| 0)
}
