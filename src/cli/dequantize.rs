//! `prequant dequantize`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use prequant::{Bytes, Error, Options, plan_dequantize};
use serde_json::json;

use super::output::{self, Outcome};
use super::progress::{Reporter, Style};
use super::streams::tell;
use super::trace::Tracing;
use super::words::{Limit, count};
use super::{hints, interrupt, left_out};

/// Decode a quantized checkpoint to bf16.
///
/// SRC is a checkpoint converted by prequant, in any format, or one that another program quantized: FP8, or 4 bits by
/// compressed-tensors, ModelOpt, gpt-oss, DeepSeek-V4, GPTQ or AWQ. DST becomes an unquantized checkpoint: every weight has the
/// value its 4-bit code stands for, in the dtype that the format's own library decodes to (bf16 if the source was bf16).
/// What prequant converted is checked against its manifest as it is read.
#[derive(Args)]
pub struct Arguments {
    /// Folder of the quantized checkpoint
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// Folder to create
    #[arg(value_name = "DST")]
    destination: PathBuf,

    /// Maximum size of the tensors in one output file
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: Bytes,

    /// Memory limit [default: 256MiB, more for checkpoints of over 190,000 tensors]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,

    /// Number of threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    /// Replace the checkpoint in DST
    #[arg(long)]
    force: bool,

    /// Discard what an unfinished run left in DST instead of resuming it
    #[arg(long)]
    restart: bool,

    /// Copy what links beside the weights lead to, wherever that is
    #[arg(long)]
    follow_links: bool,

    /// Write a timeline of what each thread does to FILE, for ui.perfetto.dev
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,

    /// Print a single JSON object on standard output
    #[arg(long)]
    json: bool,

    /// Print errors only
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
        memory: arguments.memory.map(|memory| memory.0),
        threads: arguments.threads.map_or(default.threads, NonZeroUsize::get),
        force: arguments.force,
        restart: arguments.restart,
        follow_links: arguments.follow_links,
        ..default
    };
    let mut decoding = plan_dequantize(&arguments.source, arguments.max_shard_size.0, options)?;
    let tracing = Tracing::start(arguments.trace.as_deref(), &[&arguments.source, &arguments.destination])?;
    decoding.options.trace = tracing.trace();
    let style = if arguments.quiet { Style::Silent } else { Style::of_stderr() };
    if !arguments.quiet && !arguments.json {
        tell(format_args!("memory: at most {}", Limit(decoding.budget.memory)));
    }
    if !arguments.quiet {
        decoding
            .plan
            .warnings
            .iter()
            .for_each(|warning| tell(format_args!("warning: {}", hints::shown_warning(warning))));
    }
    let reporter = Reporter::new(style, &decoding.plan);
    let files = decoding.execute_until(interrupt::flag(), &arguments.destination, &reporter)?;
    reporter.finish();
    let (destination, tensors) = (arguments.destination.display().to_string(), &decoding.plan.tensors);
    let left_out = decoding.left_out();
    let decoded = tensors.iter().filter(|tensor| tensor.is_decoded()).count();
    let (written, seconds) = (files.iter().map(|file| file.size).sum::<u64>(), start.elapsed().as_secs_f64());
    let output = match (arguments.json, arguments.quiet) {
        (true, _) => format!(
            "{}\n",
            json!({
                "destination": destination,
                "files": files,
                "left_out": left_out,
                "bytes_written": written,
                "seconds": seconds,
            })
        ),
        (false, true) => String::new(),
        (false, false) => format!(
            "{destination}: {} decoded from {}, {} copied; {} in {}, {seconds:.2} s, hashes included\n{}",
            count(decoded, "tensor"),
            decoding.converted_by().map_or_else(|| decoding.formats().join(", "), super::summary::format_name),
            tensors.len() - decoded,
            Bytes(written),
            count(files.len() + 1, "file"),
            left_out::lines(&left_out, usize::MAX).iter().map(|line| format!("{line}\n")).collect::<String>(),
        ),
    };
    Ok(Outcome { output, error: None, code: 0 })
}
