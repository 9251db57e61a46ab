//! A conversion from the page cache, against the link; and the device memory it takes.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use prequant::internal::backend::Backend;
use prequant::internal::ops::quantize::plan;
use prequant::{Bytes, Options, Progress, RecipeOptions};

use super::speed::free_memory;
use super::{Arguments, Report};

/// Of the link's rate, a conversion must reach this much.
const LINK_BAR: f64 = 0.8;

/// Bytes of bf16 in one shard.
const SHARD: u64 = 1 << 30;

struct Unseen;

impl Progress for Unseen {
    fn found(&self, _: usize, _: usize) {}
    fn resumed(&self, _: usize, _: u64) {}
    fn advanced(&self, _: &str, _: u64) {}
    fn sealed(&self, _: &str, _: u64) {}
    fn kept(&self, _: usize) {}
}

/// Converts a checkpoint several times; the best run counts.
pub fn check(
    backend: &Arc<dyn Backend>,
    arguments: &Arguments,
    link: f64,
    report: &mut Report,
) -> Result<(), Box<dyn std::error::Error>> {
    let folder = arguments.folder.join(format!("prequant-gpu-check-{}", std::process::id()));
    let source = folder.join("source");
    fs::create_dir_all(&source)?;
    let result = write_checkpoint(&source, arguments.checkpoint_size.0)
        .and_then(|()| convert(backend, arguments.gpu, &folder, arguments.report_only, link, report));
    fs::remove_dir_all(&folder)?;
    result
}

fn convert(
    backend: &Arc<dyn Backend>,
    number: usize,
    folder: &Path,
    report_only: bool,
    link: f64,
    report: &mut Report,
) -> Result<(), Box<dyn std::error::Error>> {
    let (source, to) = (folder.join("source"), folder.join("converted"));
    for double_quant in [false, true] {
        let recipe = RecipeOptions { double_quant: Some(double_quant), ..RecipeOptions::default() }.build()?;
        let mut best = f64::INFINITY;
        let (mut len, mut taken, mut bound) = (0, 0, 0);
        for _ in 0..3 {
            let options = Options { device: backend.clone().into(), ..Options::default() };
            bound = options.device_memory;
            let conversion = plan(&source, recipe.clone(), options)?;
            len = conversion.plan.source_len();
            let start = Instant::now();
            taken = taken.max(device_memory(number, || conversion.execute(&to, &Unseen))??);
            best = best.min(start.elapsed().as_secs_f64());
            fs::remove_dir_all(&to)?;
        }
        let rate = len as f64 / best;
        let what = if double_quant { "nf4, double quantization" } else { "nf4" };
        let line = format!(
            "convert ({what}): {} in {best:.3} s: {:.1} GB/s, hashes included, {:.0} % of the link",
            Bytes(len),
            rate / 1e9,
            100.0 * rate / link
        );
        report.check(rate >= LINK_BAR * link || report_only, &line);
        let line = format!("  device memory: {} at most, of {} allowed", Bytes(taken), Bytes(bound));
        report.check(taken <= bound, &line);
    }
    Ok(())
}

/// The most device memory that was taken during `work`, by what was free.
fn device_memory<T, E>(
    number: usize,
    work: impl FnOnce() -> Result<T, E>,
) -> Result<Result<u64, E>, Box<dyn std::error::Error>> {
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

/// Shards with one 3-D tensor of experts each, of small random numbers.
fn write_checkpoint(folder: &Path, len: u64) -> Result<(), Box<dyn std::error::Error>> {
    fs::write(folder.join("config.json"), "{\"model_type\": \"qwen3_moe\"}\n")?;
    let mut state = 1u32;
    let mut piece = Vec::with_capacity(1 << 22);
    while piece.len() < 1 << 22 {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        piece.extend((0x3c00 | (state >> 16 & 0x83ff) as u16).to_le_bytes());
    }
    let rows = SHARD.min(len) / 8192;
    let shards = len.div_ceil(rows * 8192);
    for shard in 0..shards {
        let (name, bytes) = (format!("model.layers.{shard}.mlp.experts.gate_up_proj"), rows * 8192);
        let entry = format!("{{\"dtype\":\"BF16\",\"shape\":[1,{rows},4096],\"data_offsets\":[0,{bytes}]}}");
        let header = format!("{{\"{name}\":{entry}}}");
        let path = folder.join(format!("model-{:05}-of-{shards:05}.safetensors", shard + 1));
        let mut file = fs::File::create(path)?;
        file.write_all(&(header.len() as u64).to_le_bytes())?;
        file.write_all(header.as_bytes())?;
        let mut left = bytes as usize;
        while left > 0 {
            let take = left.min(piece.len());
            file.write_all(&piece[..take])?;
            left -= take;
        }
    }
    Ok(())
}
