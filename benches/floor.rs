//! What a conversion can't do without, each part alone: scripts/bench-scale runs this, and times it as a process.
//!
//! `floor read` reads all files of the source; `kernel` quantizes as many weights, over and over the same ones, which stay in
//! cache; `write` writes files of the output's sizes; `hash` computes SHA-256 of as many bytes, and `hash-twice` two of them in
//! one pass. `convert` is the whole, with a kernel that can be chosen.

use std::error::Error;
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use clap::{Parser, ValueEnum};
use prequant::internal::backend::{Cpu, CpuLane, Lane, LaneSize, Run};
use prequant::internal::checkpoint::Source;
use prequant::internal::format::Codec;
use prequant::internal::kernel::sha256::{Sha256Stream, update_pair};
use prequant::internal::kernel::{Kernel, group};
use prequant::internal::store::{Location, ReadAt, read_exact_at};
use prequant::{FloatDtype, Options, Plan, PlannedTensor, RecipeOptions, plan};

/// Any error, from any thread.
type Failure = Box<dyn Error + Send + Sync>;

/// Bytes that are read, quantized, written or hashed at once.
const PIECE: usize = 1 << 20;

/// Bytes of a file of the source that a thread takes at once.
const RANGE: u64 = 16 << 20;

#[derive(Parser)]
struct Arguments {
    /// What to do
    #[arg(value_enum, required_unless_present_any = ["bench", "list_kernels"])]
    part: Option<Part>,

    /// The checkpoint
    #[arg(required_unless_present_any = ["bench", "list_kernels"])]
    source: Option<PathBuf>,

    /// A folder to be made, for `write` and `convert`
    destination: Option<PathBuf>,

    #[arg(long, default_value = "nf4")]
    format: String,

    #[arg(long)]
    double_quant: bool,

    /// Its name, in small letters
    #[arg(long)]
    kernel: Option<String>,

    /// Print the kernels that this processor runs, slowest first
    #[arg(long)]
    list_kernels: bool,

    /// All cores by default
    #[arg(long)]
    threads: Option<usize>,

    /// cargo bench passes this
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    Read,
    Kernel,
    Write,
    Hash,
    HashTwice,
    Convert,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.bench {
        println!("scripts/bench-scale runs this");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(4)
        }
    }
}

fn run(arguments: &Arguments) -> Result<(), Failure> {
    let (Some(part), Some(source)) = (arguments.part, &arguments.source) else {
        Kernel::available().iter().for_each(|kernel| println!("{}", kernel.name().to_lowercase()));
        return Ok(());
    };
    let threads = arguments.threads.map_or_else(|| thread::available_parallelism().map(usize::from), Ok)?;
    let kernel = kernel(arguments.kernel.as_deref())?;
    let device = Arc::new(Cpu::new(kernel)).into();
    let (format, double_quant) = (arguments.format.parse()?, arguments.double_quant.then_some(true));
    let recipe = RecipeOptions { format: Some(format), double_quant, ..RecipeOptions::default() }.build()?;
    let conversion = plan(source, recipe, Options { threads, device, ..Options::default() })?;
    let destination = || arguments.destination.as_deref().ok_or("a destination is needed");
    match part {
        Part::Read => read(&Source::open(source.as_path())?, threads),
        Part::Kernel => quantize(&conversion.plan, &Source::open(source.as_path())?, kernel, threads),
        Part::Write => write(&conversion.plan, &destination()?.into(), threads),
        Part::Hash | Part::HashTwice => {
            hash(&conversion.plan, part, threads);
            Ok(())
        }
        Part::Convert => Ok(conversion.execute(destination()?, &()).map(drop)?),
    }
}

/// The kernel of that name, or the fastest.
fn kernel(name: Option<&str>) -> Result<Kernel, Failure> {
    let Some(name) = name else { return Ok(Kernel::detect()) };
    let found = Kernel::available().into_iter().find(|kernel| kernel.name().to_lowercase() == name);
    Ok(found.ok_or_else(|| format!("this processor has no kernel {name:?}"))?)
}

/// Hands out items to threads, each with state of its own.
fn share<T: Sync, S>(
    threads: usize,
    items: &[T],
    state: impl Fn() -> S + Sync,
    work: impl Fn(&mut S, &T) -> Result<(), Failure> + Sync,
) -> Result<(), Failure> {
    let next = AtomicUsize::new(0);
    let run = || {
        let mut state = state();
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(&mut state, item)?;
        }
        Ok(())
    };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(run)).collect();
        let results = threads.into_iter().map(|thread| thread.join().unwrap_or(Err("a thread panicked".into())));
        results.collect()
    })
}

fn buffer() -> Vec<u8> {
    (0..PIECE as u32).map(|i| (i.wrapping_mul(2654435761) >> 24) as u8).collect()
}

fn read(source: &Source, threads: usize) -> Result<(), Failure> {
    let mut ranges = Vec::new();
    for file in &source.files {
        let opened: Arc<dyn ReadAt> = file.location.open()?.into();
        let starts = (0..file.identity.len).step_by(RANGE as usize);
        ranges.extend(starts.map(|start| (opened.clone(), start, RANGE.min(file.identity.len - start))));
    }
    share(threads, &ranges, buffer, |buffer, (file, start, len)| {
        for offset in (0..*len).step_by(PIECE) {
            let piece = &mut buffer[..(len - offset).min(PIECE as u64) as usize];
            read_exact_at(&**file, piece, start + offset)?;
        }
        Ok(())
    })
}

fn quantize(plan: &Plan, source: &Source, kernel: Kernel, threads: usize) -> Result<(), Failure> {
    let quantized: Vec<&PlannedTensor> = plan.quantized().collect();
    let codec = plan.recipe.codec();
    let weights = weights(&quantized, source)?;
    let lane = || {
        let (source, groups) = (weights.len(), weights.len() / 2);
        let mut lane =
            Cpu::new(kernel).lane(&LaneSize { source, packed: source, groups, group_len: 0, absmax: groups });
        lane.buffer().copy_from_slice(&weights);
        lane
    };
    share(threads, &quantized, lane, |lane, tensor| {
        let dtype = tensor.quantized_from().ok_or("a tensor that isn't quantized")?;
        let (len, step) = (tensor.source_len(), whole_rows(tensor));
        for offset in (0..len).step_by(step as usize) {
            quantize_piece(&codec, lane, dtype, tensor.columns(), step.min(len - offset) as usize)?;
        }
        Ok(())
    })
}

/// Bytes of as many of a tensor's rows as a piece has, at least one.
fn whole_rows(tensor: &PlannedTensor) -> u64 {
    let row = tensor.source_len() / (tensor.elements() / tensor.columns());
    (PIECE as u64 / row).max(1) * row
}

/// Weights of the source, as many as any of the tensors needs at once.
fn weights(tensors: &[&PlannedTensor], source: &Source) -> Result<Vec<u8>, Failure> {
    let first = tensors.first().ok_or("no tensor is quantized")?;
    let found = source.files.iter().find_map(|file| Some((file, file.tensors.iter().find(|t| t.name == first.name)?)));
    let (file, info) = found.ok_or_else(|| format!("tensor {:?} isn't in the source", first.name))?;
    let mut read = vec![0; whole_rows(first).min(info.len) as usize];
    File::open(file.location.path())?.read_exact_at(&mut read, info.offset)?;
    let len = tensors.iter().map(|tensor| whole_rows(tensor)).max().unwrap_or_default();
    Ok(read.iter().copied().cycle().take(len as usize).collect())
}

fn quantize_piece(
    codec: &Codec,
    lane: &mut CpuLane,
    dtype: FloatDtype,
    columns: u64,
    len: usize,
) -> Result<(), Failure> {
    let tensor_scale = match codec.has_tensor_scale() {
        true => {
            let absmax = lane.absmax(0..len, dtype)?.ok_or("weights that aren't finite")?;
            Some(group::tensor_scale(codec, absmax, dtype))
        }
        false => None,
    };
    let run = Run { codec, dtype, columns, tensor_scale, place: 0..len };
    let encoded = lane.quantize(&run)?.ok_or("weights that aren't finite")?;
    if codec.double_quant() {
        let absmax = encoded.figures.absmax().to_vec();
        black_box(lane.quantize_absmax(&absmax, absmax.iter().sum::<f32>() / absmax.len() as f32)?);
    } else {
        black_box(encoded.packed);
    }
    Ok(())
}

fn write(plan: &Plan, destination: &Location, threads: usize) -> Result<(), Failure> {
    let bytes = buffer();
    let (bytes, destination) = (&bytes, &destination);
    share(
        threads,
        &plan.files,
        || (),
        |(), file| {
            let output = destination.join(&file.name).create(file.len)?;
            let mut done = 0;
            while done < file.len {
                done += output.write_at(&bytes[..(file.len - done).min(PIECE as u64) as usize], done)? as u64;
            }
            Ok(())
        },
    )
}

fn hash(plan: &Plan, part: Part, threads: usize) {
    let bytes = buffer();
    // Split evenly: a tensor's end is a matter of nanoseconds.
    let share = plan.output_len().div_ceil(threads as u64);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let [mut file, mut tensor] = [Sha256Stream::new(), Sha256Stream::new()];
                for offset in (0..share).step_by(PIECE) {
                    let piece = black_box(&bytes[..(share - offset).min(PIECE as u64) as usize]);
                    match part {
                        Part::HashTwice => update_pair(&mut file, &mut tensor, piece),
                        _ => file.update(piece),
                    }
                }
                black_box((file.finish(), tensor.finish()));
            });
        }
    });
}
