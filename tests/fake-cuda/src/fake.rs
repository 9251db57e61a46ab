//! GPUs, contexts, streams and memory, as far as prequant sees them.
//!
//! Streams are lazy: nothing queued on one happens before it, or an event behind it, is waited for. So a result that is
//! read too early, or a buffer that is used again too early, shows. What a real driver would leave undefined ends the
//! process with a message.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::fmt::Write;
use std::time::Instant;

use ptx_interpreter::{Memory, Module};

use crate::settings::Settings;

/// An error, as the driver numbers them.
pub type Code = u32;

pub const INVALID_VALUE: Code = 1;
pub const OUT_OF_MEMORY: Code = 2;
pub const NO_DEVICE: Code = 100;
pub const INVALID_DEVICE: Code = 101;
pub const INVALID_CONTEXT: Code = 201;
pub const INVALID_PTX: Code = 218;
pub const INVALID_HANDLE: Code = 400;
pub const NOT_FOUND: Code = 500;
pub const ILLEGAL_ADDRESS: Code = 700;

/// A device address has its GPU's number, counted from 1, in the bits from this one.
const DEVICE_SHIFT: u32 = 60;

thread_local! {
    /// The GPU whose context is current to the thread, counted from 1.
    static CURRENT: Cell<usize> = const { Cell::new(0) };
}

/// Ends the process: the program did what a real driver leaves undefined.
pub fn undefined(what: &str) -> ! {
    eprintln!("fake-cuda: undefined behaviour: {what}");
    std::process::abort()
}

pub struct Fake {
    pub settings: Settings,
    calls: HashMap<&'static str, u64>,
    gpus: Vec<Gpu>,
    streams: Vec<Option<Stream>>,
    events: Vec<Option<Event>>,
    modules: Vec<Option<Module>>,
    /// Module and name.
    functions: Vec<(usize, String)>,
    /// Pinned memory: length by address.
    pinned: BTreeMap<usize, usize>,
    launches: BTreeMap<String, u64>,
    /// Bytes that were copied asynchronously.
    to_device: usize,
    to_host: usize,
}

#[derive(Default)]
struct Gpu {
    memory: Memory,
    /// Length by address.
    allocated: BTreeMap<u64, usize>,
    used: usize,
    peak: usize,
    retained: usize,
    lost: Option<Code>,
}

struct Stream {
    gpu: usize,
    queue: VecDeque<Work>,
}

#[derive(Clone, Copy)]
struct Event {
    /// The stream it was last recorded on.
    stream: Option<usize>,
    reached: Option<Instant>,
}

/// What a stream has before it.
pub enum Work {
    ToDevice { to: u64, from: usize, len: usize },
    ToHost { to: usize, from: u64, len: usize },
    Within { to: u64, from: u64, len: usize },
    Launch { function: usize, grid: [u32; 3], block: [u32; 3], params: Vec<Vec<u8>> },
    Reach(usize),
}

impl Work {
    fn uses_device(&self, start: u64, len: usize) -> bool {
        let within = |address: u64| (start..start + len as u64).contains(&address);
        match self {
            Work::ToDevice { to, .. } => within(*to),
            Work::ToHost { from, .. } => within(*from),
            Work::Within { to, from, .. } => within(*to) || within(*from),
            Work::Launch { params, .. } => {
                params.iter().any(|param| param[..].try_into().is_ok_and(|bytes| within(u64::from_le_bytes(bytes))))
            }
            Work::Reach(_) => false,
        }
    }

    fn uses_host(&self, start: usize, len: usize) -> bool {
        match self {
            Work::ToDevice { from: host, .. } | Work::ToHost { to: host, .. } => (start..start + len).contains(host),
            _ => false,
        }
    }
}

impl Fake {
    pub fn new(settings: Settings) -> Fake {
        let gpus = (0..settings.devices).map(|_| Gpu::default()).collect();
        Fake {
            settings,
            calls: HashMap::new(),
            gpus,
            streams: Vec::new(),
            events: Vec::new(),
            modules: Vec::new(),
            functions: Vec::new(),
            pinned: BTreeMap::new(),
            launches: BTreeMap::new(),
            to_device: 0,
            to_host: 0,
        }
    }

    /// Counts a call; fails if it is the one that is to fail, or its GPU is lost.
    pub fn enter(&mut self, call: &'static str) -> Result<(), Code> {
        let count = self.calls.entry(call).or_default();
        *count += 1;
        let current = CURRENT.get().checked_sub(1).and_then(|gpu| self.gpus.get_mut(gpu));
        if let Some(failure) = &self.settings.fail
            && (failure.call == call && failure.number == *count)
        {
            if let Some(gpu) = current
                && failure.code != OUT_OF_MEMORY
            {
                gpu.lost = Some(failure.code);
            }
            return Err(failure.code);
        }
        current.and_then(|gpu| gpu.lost).map_or(Ok(()), Err)
    }

    pub fn retain(&mut self, gpu: usize) -> Result<(), Code> {
        self.gpus.get_mut(gpu).ok_or(INVALID_DEVICE)?.retained += 1;
        Ok(())
    }

    /// Releases a context; after the last one, writes the report.
    pub fn release(&mut self, gpu: usize) -> Result<(), Code> {
        let retained = &mut self.gpus.get_mut(gpu).ok_or(INVALID_DEVICE)?.retained;
        *retained = retained.checked_sub(1).ok_or(INVALID_CONTEXT)?;
        if let Some(path) = &self.settings.report
            && self.gpus.iter().all(|gpu| gpu.retained == 0)
        {
            std::fs::write(path, self.report()).expect("FAKE_CUDA_REPORT: a file that can be written");
        }
        Ok(())
    }

    /// A line for each thing: its name and a number.
    fn report(&self) -> String {
        let mut text = String::new();
        for (i, gpu) in self.gpus.iter().enumerate() {
            let _ = writeln!(text, "peak:{i} {}\nleaked:{i} {}", gpu.peak, gpu.allocated.len());
        }
        let open = self.streams.iter().flatten().count() + self.events.iter().flatten().count();
        let open = open + self.modules.iter().flatten().count() + self.pinned.len();
        let _ = writeln!(text, "streams {}\nopen {open}", self.streams.len());
        let _ = writeln!(text, "to_device {}\nto_host {}", self.to_device, self.to_host);
        for (kernel, launches) in &self.launches {
            let _ = writeln!(text, "{kernel} {launches}");
        }
        text
    }

    pub fn set_current(&mut self, gpu: usize) -> Result<(), Code> {
        if self.gpus.get(gpu).is_none_or(|gpu| gpu.retained == 0) {
            return Err(INVALID_CONTEXT);
        }
        CURRENT.set(gpu + 1);
        Ok(())
    }

    fn current(&self) -> Result<usize, Code> {
        let gpu = CURRENT.get().checked_sub(1).ok_or(INVALID_CONTEXT)?;
        if self.gpus[gpu].retained > 0 { Ok(gpu) } else { Err(INVALID_CONTEXT) }
    }

    /// Bytes free, and all.
    pub fn memory(&self) -> Result<(usize, usize), Code> {
        Ok((self.settings.free - self.gpus[self.current()?].used, 2 * self.settings.free))
    }

    pub fn allocate(&mut self, len: usize) -> Result<u64, Code> {
        let which = self.current()?;
        let gpu = &mut self.gpus[which];
        if len == 0 {
            return Err(INVALID_VALUE);
        }
        if gpu.used + len > self.settings.free {
            return Err(OUT_OF_MEMORY);
        }
        let address = gpu.memory.allocate(len) | (which as u64 + 1) << DEVICE_SHIFT;
        gpu.allocated.insert(address, len);
        gpu.used += len;
        gpu.peak = gpu.peak.max(gpu.used);
        Ok(address)
    }

    pub fn free(&mut self, address: u64) -> Result<(), Code> {
        let which = self.current()?;
        let plain = untagged(address, which)?;
        let len = self.gpus[which].allocated.remove(&address).ok_or(INVALID_VALUE)?;
        if self.queued().any(|work| work.uses_device(address, len)) {
            undefined("device memory freed while a stream has work with it before it");
        }
        let gpu = &mut self.gpus[which];
        gpu.used -= len;
        gpu.memory.free(plain).map_err(|_| INVALID_VALUE)
    }

    pub fn pin(&mut self, len: usize) -> Result<usize, Code> {
        self.current()?;
        // Not from the allocator, which might hand out again what a test should see freed.
        let start = Box::leak(vec![0xa5u8; len].into_boxed_slice()).as_mut_ptr() as usize;
        self.pinned.insert(start, len);
        Ok(start)
    }

    pub fn unpin(&mut self, start: usize) -> Result<(), Code> {
        let len = self.pinned.remove(&start).ok_or(INVALID_VALUE)?;
        if self.queued().any(|work| work.uses_host(start, len)) {
            undefined("pinned memory freed while a stream has work with it before it");
        }
        Ok(())
    }

    /// All that any stream has before it.
    fn queued(&self) -> impl Iterator<Item = &Work> {
        self.streams.iter().flatten().flat_map(|stream| &stream.queue)
    }

    fn check_pinned(&self, start: usize, len: usize) {
        let within = self.pinned.range(..=start).next_back().is_some_and(|(at, size)| start + len <= at + size);
        if !within {
            undefined("an asynchronous copy from or to memory that isn't pinned");
        }
    }

    /// Copies at once.
    pub fn upload(&mut self, to: u64, bytes: &[u8]) -> Result<(), Code> {
        let which = self.current()?;
        self.gpus[which].memory.write(untagged(to, which)?, bytes).map_err(|_| INVALID_VALUE)
    }

    pub fn load_module(&mut self, ptx: &str) -> Result<usize, Code> {
        self.current()?;
        let module = Module::parse(ptx).map_err(|why| {
            eprintln!("fake-cuda: {why}");
            INVALID_PTX
        })?;
        self.modules.push(Some(module));
        Ok(self.modules.len())
    }

    pub fn unload_module(&mut self, module: usize) -> Result<(), Code> {
        take(&mut self.modules, module).map(|_| ())
    }

    pub fn function(&mut self, module: usize, name: &str) -> Result<usize, Code> {
        let Some(Some(loaded)) = self.modules.get(module.wrapping_sub(1)) else { return Err(INVALID_HANDLE) };
        loaded.entry(name).ok_or(NOT_FOUND)?;
        self.functions.push((module, name.to_owned()));
        Ok(self.functions.len())
    }

    /// The sizes of a function's parameters.
    pub fn params(&self, function: usize) -> Result<Vec<usize>, Code> {
        let (module, name) = self.functions.get(function.wrapping_sub(1)).ok_or(INVALID_HANDLE)?;
        let module = self.modules[module - 1].as_ref().ok_or(INVALID_HANDLE)?;
        Ok(module.entry(name).ok_or(NOT_FOUND)?.params.iter().map(|param| param.size).collect())
    }

    pub fn create_stream(&mut self) -> Result<usize, Code> {
        let gpu = self.current()?;
        self.streams.push(Some(Stream { gpu, queue: VecDeque::new() }));
        Ok(self.streams.len())
    }

    pub fn destroy_stream(&mut self, stream: usize) -> Result<(), Code> {
        let Stream { queue, .. } = take(&mut self.streams, stream)?;
        if queue.is_empty() { Ok(()) } else { undefined("a stream destroyed with work before it") }
    }

    pub fn create_event(&mut self) -> Result<usize, Code> {
        self.current()?;
        self.events.push(Some(Event { stream: None, reached: None }));
        Ok(self.events.len())
    }

    pub fn destroy_event(&mut self, event: usize) -> Result<(), Code> {
        take(&mut self.events, event).map(|_| ())
    }

    pub fn record(&mut self, event: usize, stream: usize) -> Result<(), Code> {
        let Some(Some(recorded)) = self.events.get_mut(event.wrapping_sub(1)) else { return Err(INVALID_HANDLE) };
        *recorded = Event { stream: Some(stream), reached: None };
        self.queue(stream, Work::Reach(event))
    }

    /// When an event was reached, as it must have been.
    pub fn reached(&self, event: usize) -> Result<Instant, Code> {
        let Some(Some(event)) = self.events.get(event.wrapping_sub(1)) else { return Err(INVALID_HANDLE) };
        event.reached.ok_or(600)
    }

    pub fn queue(&mut self, stream: usize, work: Work) -> Result<(), Code> {
        match work {
            Work::ToDevice { from: host, len, .. } | Work::ToHost { to: host, len, .. } => self.check_pinned(host, len),
            _ => {}
        }
        let current = self.current()?;
        let Some(Some(stream)) = self.streams.get_mut(stream.wrapping_sub(1)) else { return Err(INVALID_HANDLE) };
        if stream.gpu != current {
            return Err(INVALID_CONTEXT);
        }
        match work {
            Work::ToDevice { len, .. } => self.to_device += len,
            Work::ToHost { len, .. } => self.to_host += len,
            _ => {}
        }
        stream.queue.push_back(work);
        Ok(())
    }

    /// Does what the stream has before it, up to the event.
    pub fn wait_for(&mut self, event: usize) -> Result<(), Code> {
        let Some(Some(Event { stream, .. })) = self.events.get(event.wrapping_sub(1)) else {
            return Err(INVALID_HANDLE);
        };
        let Some(stream) = *stream else { return Ok(()) };
        while self.events[event - 1].is_some_and(|event| event.reached.is_none()) {
            if !self.step(stream)? {
                return Err(INVALID_HANDLE);
            }
        }
        Ok(())
    }

    /// Does all that the stream has before it.
    pub fn synchronize(&mut self, stream: usize) -> Result<(), Code> {
        while self.step(stream)? {}
        Ok(())
    }

    /// Does one thing; false if there was none.
    fn step(&mut self, stream: usize) -> Result<bool, Code> {
        let Some(Some(Stream { gpu, queue })) = self.streams.get_mut(stream.wrapping_sub(1)) else {
            return Err(INVALID_HANDLE);
        };
        let (which, Some(work)) = (*gpu, queue.pop_front()) else { return Ok(false) };
        if let Err(what) = self.perform(which, work) {
            eprintln!("fake-cuda: {what}");
            self.gpus[which].lost = Some(ILLEGAL_ADDRESS);
            return Err(ILLEGAL_ADDRESS);
        }
        Ok(true)
    }

    fn perform(&mut self, which: usize, work: Work) -> Result<(), String> {
        let memory = &mut self.gpus[which].memory;
        let address = |tagged| untagged(tagged, which).map_err(|_| format!("{tagged:#x} isn't on this GPU"));
        match work {
            Work::ToDevice { to, from, len } => {
                // SAFETY: within pinned memory, as was checked; what isn't can't be freed before the stream is empty.
                let bytes = unsafe { std::slice::from_raw_parts(from as *const u8, len) };
                memory.write(address(to)?, bytes).map_err(|fault| fault.to_string())
            }
            Work::ToHost { to, from, len } => {
                let bytes = memory.read(address(from)?, len).map_err(|fault| fault.to_string())?;
                // SAFETY: as above; `bytes` is `len` long.
                unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to as *mut u8, len) };
                Ok(())
            }
            Work::Within { to, from, len } => {
                let bytes = memory.read(address(from)?, len).map_err(|fault| fault.to_string())?;
                memory.write(address(to)?, &bytes).map_err(|fault| fault.to_string())
            }
            Work::Launch { function, grid, block, mut params } => {
                let (module, name) = &self.functions[function - 1];
                // Every 8-byte parameter of these kernels is an address.
                for param in params.iter_mut().filter(|param| param.len() == 8) {
                    let tagged = u64::from_le_bytes(param[..].try_into().map_err(|_| "8 bytes")?);
                    *param = address(tagged)?.to_le_bytes().to_vec();
                }
                let entry = self.modules[module - 1].as_ref().and_then(|module| module.entry(name));
                *self.launches.entry(name.clone()).or_default() += 1;
                let entry = entry.ok_or("a kernel of a module that is unloaded")?;
                entry.launch(memory, grid, block, &params).map_err(|fault| fault.to_string())
            }
            Work::Reach(event) => {
                if let Some(Some(event)) = self.events.get_mut(event - 1) {
                    event.reached = Some(Instant::now());
                }
                Ok(())
            }
        }
    }
}

/// The interpreter's address of one on this GPU.
fn untagged(address: u64, gpu: usize) -> Result<u64, Code> {
    let plain = address & ((1 << DEVICE_SHIFT) - 1);
    if address >> DEVICE_SHIFT == gpu as u64 + 1 { Ok(plain) } else { Err(INVALID_VALUE) }
}

/// Takes what a handle, counted from 1, stands for.
fn take<T>(all: &mut [Option<T>], handle: usize) -> Result<T, Code> {
    all.get_mut(handle.wrapping_sub(1)).and_then(Option::take).ok_or(INVALID_HANDLE)
}
