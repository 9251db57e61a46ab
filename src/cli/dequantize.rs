//! `prequant dequantize`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use prequant::Error;
use prequant::ops::dequantize::plan;
use prequant::ops::quantize::Options;
use prequant::units::Bytes;
use serde_json::json;

use super::interrupt;
use super::output::{self, Outcome};
use super::progress::{Reporter, Style};

/// Write a converted checkpoint's weights back as bf16: to merge adapters into, or for a look.
///
/// SRC is a checkpoint that prequant converted, of any format. DST becomes a checkpoint without quantization: every weight
/// is what its 4-bit codes stand for, in the dtype that the format's own library decodes to (bf16, where the source was).
/// What is read is held against SRC's manifest.
#[derive(Args)]
pub struct Arguments {
    /// The converted checkpoint's folder
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// The folder to be made
    #[arg(value_name = "DST")]
    destination: PathBuf,

    /// The most bytes of tensors in one output file
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: Bytes,

    /// The most memory to use
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    memory: Bytes,

    /// Threads to use [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Replace the checkpoint in DST
    #[arg(long)]
    force: bool,

    /// Discard what an earlier, unfinished run left in DST, rather than go on with it
    #[arg(long)]
    restart: bool,

    /// Print one JSON object at the end, and no other line on standard output
    #[arg(long)]
    json: bool,

    /// Print nothing but errors
    #[arg(long, short)]
    quiet: bool,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> ExitCode {
    output::finish(dequantize(arguments), arguments.json)
}

fn dequantize(arguments: &Arguments) -> Result<Outcome, Error> {
    let start = Instant::now();
    let default = Options::default();
    let options = Options {
        memory: arguments.memory.0,
        threads: arguments.threads.map_or(default.threads, NonZeroUsize::get),
        force: arguments.force,
        restart: arguments.restart,
        ..default
    };
    let conversion = plan(&arguments.source, arguments.max_shard_size.0, options)?;
    let style = if arguments.quiet { Style::Silent } else { Style::of_stderr() };
    if !arguments.quiet {
        conversion.plan.warnings.iter().for_each(|warning| eprintln!("warning: {warning}"));
    }
    let reporter = Reporter::new(style, &conversion);
    let files = conversion.dequantize_until(interrupt::flag(), &arguments.destination, &reporter)?;
    reporter.finish();
    let (destination, tensors) = (arguments.destination.display().to_string(), &conversion.plan.tensors);
    let decoded = tensors.iter().filter(|tensor| tensor.is_decoded()).count();
    let (written, seconds) = (files.iter().map(|file| file.size).sum::<u64>(), start.elapsed().as_secs_f64());
    let output = match (arguments.json, arguments.quiet) {
        (true, _) => format!(
            "{}\n",
            json!({"destination": destination, "files": files, "bytes_written": written, "seconds": seconds})
        ),
        (false, true) => String::new(),
        (false, false) => format!(
            "{destination}: {decoded} tensors decoded from {}, {} copied; {} in {} files, {seconds:.2} s, hashes included\n",
            super::summary::format_name(&conversion.plan.recipe),
            tensors.len() - decoded,
            Bytes(written),
            files.len() + 1,
        ),
    };
    Ok(Outcome { output, error: None, code: 0 })
}
