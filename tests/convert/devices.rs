//! A conversion on a device that prequant doesn't know: the scalar kernel behind a queue. The bytes must be the processor's,
//! whatever the device has no kernel for.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::thread;

use prequant::internal::backend::{Backend, Cpu, Devices, Encoded, Fault, Lane, LaneSize, Run};
use prequant::internal::format::{Codec, FP4, INT4, INT4_ASYM, MXFP4, NF4, NVFP4};
use prequant::internal::kernel::{BlockErrors, Figures, Kernel};
use prequant::internal::ops::quantize::plan;
use prequant::{
    ErrorKind, FloatDtype, GroupSize, Hint, Layout, ManifestHead, NonFinitePolicy, Options, Progress, Recipe,
    RecipeOptions, Result,
};
use safetensors::tensor::Dtype;

use crate::support::{Folder, LINEAR, Tensor, contents, serialize};

/// Nobody watches.
struct Unseen;

impl Progress for Unseen {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn kept(&self, _: usize) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {}
}

const NAME: &str = "queue:0";

type Work = Box<dyn FnOnce() + Send>;

/// A device with a thread of its own, which takes work from a queue of two.
#[derive(Debug)]
struct Queue {
    work: SyncSender<Work>,
    has_kernel: fn(&Codec) -> bool,
    /// The piece of work that fails, and whether for want of memory.
    fails: Option<(usize, bool)>,
    started: AtomicUsize,
    lanes: AtomicUsize,
}

impl Queue {
    fn new(has_kernel: fn(&Codec) -> bool, fails: Option<(usize, bool)>) -> Arc<Queue> {
        let (work, queued) = sync_channel::<Work>(2);
        thread::spawn(|| queued.into_iter().for_each(|work| work()));
        let (started, lanes) = Default::default();
        Arc::new(Queue { work, has_kernel, fails, started, lanes })
    }

    fn with_all_kernels() -> Arc<Queue> {
        Queue::new(|_| true, None)
    }

    /// Has the device's thread do `work`, unless this is where it fails.
    fn have_done<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> Result<T, Fault> {
        let number = self.started.fetch_add(1, Ordering::SeqCst);
        if let Some((_, is_out_of_memory)) = self.fails.filter(|(fails, _)| *fails == number) {
            let why = "it caught fire".into();
            return Err(Fault { device: NAME.to_owned(), why, is_out_of_memory });
        }
        let (done, result) = sync_channel(1);
        self.work.send(Box::new(move || done.send(work()).unwrap())).unwrap();
        Ok(result.recv().unwrap())
    }
}

/// The queue as a backend.
#[derive(Debug)]
struct Queued(Arc<Queue>);

impl Backend for Queued {
    fn name(&self) -> String {
        NAME.to_owned()
    }

    fn devices(&self) -> Option<Devices> {
        Some(Devices { count: 1, lanes_each: 2, waiting: 1, reserved: 0 })
    }

    fn quantizes(&self, codec: &Codec, _: u64) -> bool {
        (self.0.has_kernel)(codec)
    }

    fn prepare(&self, _: &Codec, memory: u64) -> Result<()> {
        assert!(memory > 0);
        Ok(())
    }

    fn lane_len(&self, size: &LaneSize) -> u64 {
        (size.source + size.packed + size.groups * (16 + size.group_len)) as u64
    }

    fn open_lane(&self, device: usize, size: &LaneSize) -> Result<Box<dyn Lane>, Fault> {
        assert_eq!(device, 0);
        self.0.lanes.fetch_add(1, Ordering::SeqCst);
        let source = vec![0; size.source];
        Ok(Box::new(QueueLane { queue: self.0.clone(), size: *size, source, results: Results::default() }))
    }
}

struct QueueLane {
    queue: Arc<Queue>,
    size: LaneSize,
    source: Vec<u8>,
    results: Results,
}

/// What the device sent back.
#[derive(Default)]
struct Results {
    finite: bool,
    packed: Vec<u8>,
    scales: Vec<u8>,
    zero_points: Vec<u8>,
    figures: [Vec<f32>; 4],
}

impl Lane for QueueLane {
    fn source(&mut self, len: usize) -> &mut [u8] {
        &mut self.source[..len]
    }

    fn absmax(&mut self, place: Range<usize>, dtype: FloatDtype) -> Result<Option<f32>, Fault> {
        let bytes = self.source[place].to_vec();
        self.queue.have_done(move || Kernel::SCALAR.absmax(&bytes, dtype).ok())
    }

    fn quantize(&mut self, run: &Run<'_>) -> Result<Option<Encoded<'_>>, Fault> {
        assert!((self.queue.has_kernel)(run.codec), "there is no such kernel");
        let Run { dtype, columns, tensor_scale, .. } = *run;
        let (size, codec, bytes) = (self.size, *run.codec, self.source[run.place.clone()].to_vec());
        self.results = self.queue.have_done(move || {
            let mut lane = Cpu::new(Kernel::SCALAR).lane(&size);
            lane.source(bytes.len()).copy_from_slice(&bytes);
            let run = Run { codec: &codec, dtype, columns, tensor_scale, place: 0..bytes.len() };
            let Some(Encoded { packed, scales, zero_points, figures }) = lane.quantize(&run).unwrap() else {
                return Results::default();
            };
            let Figures::Blocks(BlockErrors { absmax, signal, noise, worst }) = figures else { unreachable!() };
            let figures = [absmax, signal, noise, worst].map(|figure| figure.to_vec());
            let [packed, scales, zero_points] = [packed, scales, zero_points].map(|bytes| bytes.to_vec());
            Results { finite: true, packed, scales, zero_points, figures }
        })?;
        let Results { finite, packed, scales, zero_points, figures } = &mut self.results;
        let [absmax, signal, noise, worst] = figures.each_mut().map(Vec::as_mut_slice);
        let figures = Figures::Blocks(BlockErrors { absmax, signal, noise, worst });
        Ok(finite.then_some(Encoded { packed, scales, zero_points, figures }))
    }

    fn quantize_absmax(&mut self, absmax: &[f32], offset: f32) -> Result<(&[u8], &[f32]), Fault> {
        let (size, absmax) = (self.size, absmax.to_vec());
        self.results = self.queue.have_done(move || {
            let mut lane = Cpu::new(Kernel::SCALAR).lane(&size);
            let (codes, nested_absmax) = lane.quantize_absmax(&absmax, offset).unwrap();
            let figures = [nested_absmax.to_vec(), Vec::new(), Vec::new(), Vec::new()];
            Results { packed: codes.to_vec(), figures, ..Results::default() }
        })?;
        Ok((&self.results.packed, &self.results.figures[0]))
    }
}

/// Two shards of weights of every dtype, in many chunks, for formats of any group.
fn source() -> Folder {
    let folder = Folder::new("llama");
    let name = |layer: usize, name: &str| format!("model.layers.{layer}.mlp.{name}.weight");
    folder.write_shards(&[
        vec![
            Tensor::random(&name(0, "up_proj"), Dtype::BF16, &[1040, 512]),
            Tensor::random(&name(0, "gate_proj"), Dtype::BF16, &[1040, 512]),
            Tensor::random("model.norm.weight", Dtype::BF16, &[512]),
        ],
        vec![
            Tensor::random(&name(1, "up_proj"), Dtype::F16, &[520, 1024]),
            Tensor::random(&name(1, "down_proj"), Dtype::F32, &[264, 640]),
        ],
    ]);
    folder
}

fn convert(source: &Path, to: &Path, recipe: &Recipe, device: Arc<dyn Backend>) -> Result<ManifestHead> {
    let options = Options { threads: 3, device: device.into(), ..Options::default() };
    let mut conversion = plan(source, recipe.clone(), options)?;
    conversion.budget = conversion.budget.with_chunk_elements(1);
    conversion.execute(to, &Unseen)
}

/// Every way to quantize.
fn recipes() -> Vec<Recipe> {
    // Rows that kernels of servers don't take, too.
    let include = Some(vec!["mlp".to_owned()]);
    let of = |format| RecipeOptions { format: Some(format), include: include.clone(), ..RecipeOptions::default() };
    let all = [
        of(&NF4),
        RecipeOptions { double_quant: Some(true), ..of(&NF4) },
        of(&FP4),
        of(&INT4),
        RecipeOptions { group_size: Some(GroupSize::Channel), ..of(&INT4) },
        of(&INT4_ASYM),
        of(&MXFP4),
        of(&NVFP4),
        RecipeOptions { layout: Some(Layout::Modelopt), ..of(&NVFP4) },
    ];
    all.map(|options| options.build().unwrap()).into()
}

/// Converts by every recipe on the processor and on the device; the latter's work is checked by `check`.
#[track_caller]
fn same_bytes(queue: fn() -> Arc<Queue>, check: fn(&Queue, &Recipe)) {
    let folder = source();
    for (i, recipe) in recipes().iter().enumerate() {
        let [cpu, device] = ["cpu", "device"].map(|of| folder.beside(&format!("{of}-{i}")));
        convert(&folder.source(), &cpu, recipe, Arc::new(Cpu::detect())).unwrap();
        let queue = queue();
        convert(&folder.source(), &device, recipe, Arc::new(Queued(queue.clone()))).unwrap();
        assert!(contents(&cpu) == contents(&device), "{recipe:?}");
        check(&queue, recipe);
    }
}

#[test]
fn a_device_gives_the_processors_bytes_in_every_format() {
    same_bytes(Queue::with_all_kernels, |queue, recipe| {
        assert!(queue.started.load(Ordering::SeqCst) > 8, "{recipe:?}");
    });
}

#[test]
fn what_a_device_has_no_kernel_for_the_processor_quantizes() {
    same_bytes(
        || Queue::new(Codec::is_blocks, None),
        |queue, recipe| {
            let works = queue.started.load(Ordering::SeqCst) > 0;
            assert_eq!(works, recipe.codec().is_blocks(), "{recipe:?}");
        },
    );
}

#[test]
fn a_device_without_a_kernel_needs_no_memory() {
    let folder = source();
    let with = |queue: Arc<Queue>| {
        let device = Arc::new(Queued(queue)).into();
        plan(folder.source(), Recipe::default(), Options { threads: 2, device, device_memory: 1, ..Options::default() })
    };
    assert_eq!(with(Queue::with_all_kernels()).unwrap_err().kind(), ErrorKind::DeviceMemory);
    let conversion = with(Queue::new(|_| false, None)).unwrap();
    assert_eq!((conversion.budget.lanes, conversion.budget.device_peak()), (None, 0));
    conversion.execute(folder.destination(), &Unseen).unwrap();
}

#[test]
fn a_device_that_fails_is_named_and_another_run_finishes() {
    let folder = source();
    let (to, expected) = (folder.destination(), folder.beside("expected"));
    let recipe = RecipeOptions { double_quant: Some(true), ..RecipeOptions::default() }.build().unwrap();
    convert(&folder.source(), &expected, &recipe, Arc::new(Cpu::detect())).unwrap();
    let failed = Arc::new(Queued(Queue::new(|_| true, Some((5, false)))));
    let error = convert(&folder.source(), &to, &recipe, failed).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert_eq!(error.hints(), [Hint::Resume, Hint::UseCpu]);
    assert_eq!(error.to_string(), "queue:0: it caught fire");
    convert(&folder.source(), &to, &recipe, Arc::new(Queued(Queue::with_all_kernels()))).unwrap();
    assert!(contents(&to) == contents(&expected));
}

#[test]
fn a_device_out_of_memory_makes_do_with_fewer_lanes() {
    let folder = source();
    let (to, expected) = (folder.destination(), folder.beside("expected"));
    let recipe = Recipe::default();
    convert(&folder.source(), &expected, &recipe, Arc::new(Cpu::detect())).unwrap();
    let queue = Queue::new(|_| true, Some((3, true)));
    convert(&folder.source(), &to, &recipe, Arc::new(Queued(queue.clone()))).unwrap();
    assert!(contents(&to) == contents(&expected));
    assert!(queue.lanes.load(Ordering::SeqCst) >= 2, "the lane that failed was given up");
}

#[test]
fn what_is_not_finite_is_the_same_error_and_the_same_bytes_on_a_device() {
    let folder = Folder::new("llama");
    let mut tensor = Tensor::random(LINEAR, Dtype::BF16, &[1040, 512]);
    for element in [77, 300_000] {
        tensor.data[2 * element..][..2].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    }
    tensor.data[2 * 99_000..][..2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    folder.write("model.safetensors", serialize(&[tensor]));
    for recipe in recipes() {
        let on = |device: Arc<dyn Backend>| convert(&folder.source(), &folder.destination(), &recipe, device);
        let on_cpu = on(Arc::new(Cpu::detect())).unwrap_err();
        let on_device = on(Arc::new(Queued(Queue::with_all_kernels()))).unwrap_err();
        assert!(on_cpu.to_string().contains("3 values that are not finite, the first (NaN) at element 77"), "{on_cpu}");
        assert_eq!(on_cpu.to_string(), on_device.to_string(), "{recipe:?}");
    }
    let keep = RecipeOptions { nonfinite: Some(NonFinitePolicy::Keep), ..RecipeOptions::default() };
    let recipe = keep.build().unwrap();
    let [cpu, device] = ["cpu", "device"].map(|name| folder.beside(name));
    convert(&folder.source(), &cpu, &recipe, Arc::new(Cpu::detect())).unwrap();
    convert(&folder.source(), &device, &recipe, Arc::new(Queued(Queue::with_all_kernels()))).unwrap();
    assert!(contents(&cpu) == contents(&device));
}
