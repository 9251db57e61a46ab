//! Conversions from the page cache on the GPU and on the CPU: the same bytes, the time of each, and the device memory taken.

use std::error::Error;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use prequant::internal::backend::{Backend, Device, DeviceChoice};
use prequant::internal::ops::quantize::plan;
use prequant::{Bytes, Layout, Options, Recipe, RecipeOptions};

use super::speed::free_memory;
use super::{Arguments, Report, checkpoint};

/// Of the CPU's rate, the GPU must reach this much, with sources of [`LEAST_SOURCE`] bytes or more.
const RATIO_BAR: f64 = 0.97;

const LEAST_SOURCE: u64 = 8_000_000_000;

/// Bytes of two files that are compared at once.
const BUFFER: usize = 1 << 20;

/// The recipes' names.
pub const RECIPES: [&str; 8] =
    ["nf4", "nf4-double-quant", "fp4", "int4", "int4-asym", "nvfp4", "nvfp4-modelopt", "mxfp4"];

fn recipe(name: &str) -> Result<Recipe, Box<dyn Error>> {
    let (format, double_quant, layout) = match name {
        "nf4-double-quant" => ("nf4", Some(true), None),
        "nvfp4-modelopt" => ("nvfp4", None, Some(Layout::Modelopt)),
        format => (format, None, None),
    };
    let format = Some(format.parse()?);
    Ok(RecipeOptions { format, double_quant, layout, ..RecipeOptions::default() }.build()?)
}

/// Converts a checkpoint by every recipe, on the GPU and on the CPU.
pub fn check(
    backend: &Arc<dyn Backend>,
    arguments: &Arguments,
    link: f64,
    report: &mut Report,
) -> Result<(), Box<dyn Error>> {
    let folder = arguments.folder.join(format!("prequant-gpu-check-{}", std::process::id()));
    let result = checkpoint::write(&folder.join("source"), arguments.checkpoint_size.0)
        .map_err(Box::from)
        .and_then(|()| check_in(backend, arguments, &folder, link, report));
    fs::remove_dir_all(&folder)?;
    result
}

fn check_in(
    backend: &Arc<dyn Backend>,
    arguments: &Arguments,
    folder: &Path,
    link: f64,
    report: &mut Report,
) -> Result<(), Box<dyn Error>> {
    for name in RECIPES {
        let (same, len) = compare(backend, arguments.gpu, folder, name, report)?;
        let said = if same { "as on the CPU" } else { "differ from the CPU's" };
        report.check(same, &format!("convert ({name}): files and manifest {said}"));
        let [cpu, gpu] = times(arguments, folder, name)?;
        let rate = |seconds: f64| len as f64 / seconds / 1e9;
        let line = format!(
            "  {}: CPU {cpu:.3} s ({:.1} GB/s), GPU {gpu:.3} s ({:.1} GB/s, {:.0} % of the link); GPU / CPU {:.2}x; medians of {}",
            Bytes(len),
            rate(cpu),
            rate(gpu),
            100.0 * rate(gpu) * 1e9 / link,
            cpu / gpu,
            arguments.runs
        );
        report.check(cpu / gpu >= RATIO_BAR || len < LEAST_SOURCE || arguments.report_only, &line);
        let options = Options { device: DeviceChoice::Auto.into(), ..Options::default() };
        let auto = plan(folder.join("source").as_path(), recipe(name)?, options)?.device;
        report.line(&format!("  auto: {}: {}", auto.backend.name(), auto.why.unwrap_or_default()));
    }
    Ok(())
}

/// Whether the GPU writes the CPU's files, statistics included, and the source's length; checks the device memory, too.
fn compare(
    backend: &Arc<dyn Backend>,
    number: usize,
    folder: &Path,
    name: &str,
    report: &mut Report,
) -> Result<(bool, u64), Box<dyn Error>> {
    let (cpu, gpu) = (folder.join("cpu"), folder.join("gpu"));
    let planned = |device: Device| {
        let options = Options { device, ..Options::default() };
        plan(folder.join("source").as_path(), recipe(name)?, options).map_err(Box::<dyn Error>::from)
    };
    planned(DeviceChoice::Cpu.into())?.execute(&cpu, &())?;
    let conversion = planned(backend.clone().into())?;
    let (len, bound) = (conversion.plan.source_len(), conversion.options.device_memory);
    let taken = device_memory(number, || conversion.execute(&gpu, &()))??;
    report.check(
        taken <= bound,
        &format!("device memory ({name}): {} at most, of {} allowed", Bytes(taken), Bytes(bound)),
    );
    let mut same = true;
    for entry in fs::read_dir(&cpu)? {
        let entry = entry?.file_name();
        same &= same_file(&cpu.join(&entry), &gpu.join(&entry))?;
    }
    same &= fs::read_dir(&cpu)?.count() == fs::read_dir(&gpu)?.count();
    fs::remove_dir_all(&cpu)?;
    fs::remove_dir_all(&gpu)?;
    Ok((same, len))
}

fn same_file(one: &Path, other: &Path) -> Result<bool, Box<dyn Error>> {
    let (mut one, mut other) = (File::open(one)?, File::open(other)?);
    let mut left = one.metadata()?.len();
    let same_len = left == other.metadata()?.len();
    let (mut a, mut b) = (vec![0; BUFFER], vec![0; BUFFER]);
    while same_len && left > 0 {
        let step = left.min(BUFFER as u64) as usize;
        one.read_exact(&mut a[..step])?;
        other.read_exact(&mut b[..step])?;
        if a[..step] != b[..step] {
            return Ok(false);
        }
        left -= step as u64;
    }
    Ok(same_len)
}

/// Medians of the seconds on the CPU and on the GPU, each run in a process of its own, in turn: starting the GPU counts.
fn times(arguments: &Arguments, folder: &Path, name: &str) -> Result<[f64; 2], Box<dyn Error>> {
    let devices = ["cpu".to_owned(), format!("cuda:{}", arguments.gpu)];
    let mut seconds = [Vec::new(), Vec::new()];
    for run in 0..arguments.runs {
        // Neither is always first.
        for which in if run % 2 == 0 { [0, 1] } else { [1, 0] } {
            let to = folder.join("timed");
            let start = Instant::now();
            let mut command = Command::new(std::env::current_exe()?);
            command.args(["--one", name, "--device", &devices[which], "--folder"]).arg(folder);
            if !command.status()?.success() {
                return Err(format!("converting to {name} on {} failed", devices[which]).into());
            }
            seconds[which].push(start.elapsed().as_secs_f64());
            fs::remove_dir_all(&to)?;
        }
    }
    Ok(seconds.map(|mut seconds| {
        seconds.sort_by(f64::total_cmp);
        seconds[seconds.len() / 2]
    }))
}

/// One of the runs that are timed.
pub fn one(folder: &Path, name: &str, device: DeviceChoice) -> Result<(), Box<dyn Error>> {
    let options = Options { device: device.into(), ..Options::default() };
    plan(folder.join("source").as_path(), recipe(name)?, options)?.execute(folder.join("timed"), &())?;
    Ok(())
}

/// The most device memory that was taken during `work`, by what was free.
fn device_memory<T, E>(number: usize, work: impl FnOnce() -> Result<T, E>) -> Result<Result<u64, E>, Box<dyn Error>> {
    let before = free_memory(number)?;
    let (least, stop) = (AtomicU64::new(before), AtomicBool::new(false));
    let done = thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                least.fetch_min(free_memory(number).unwrap_or(before), Ordering::Relaxed);
                thread::sleep(Duration::from_millis(1));
            }
        });
        let done = work();
        stop.store(true, Ordering::Relaxed);
        done
    });
    Ok(done.map(|_| before - least.into_inner()))
}
