//! `prequant convert`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use prequant::{Bytes, Error, Finished, FormatSpec, Options, Recipe, RecipeOptions, plan, recipe_of};

use super::output::{self, Audience, Outcome};
use super::progress::{Reporter, Style};
use super::streams::tell;
use super::trace::Tracing;
use super::words::Limit;
use super::{device, dry_run, hints, interrupt, quantize, summary};

/// Quantize a checkpoint to 4 bits.
///
/// SRC is a folder with config.json and safetensors files, as downloaded from the Hugging Face hub, or a single safetensors
/// file. DST becomes a complete checkpoint: 4-bit weights, config.json, tokenizer and all other files, a manifest
/// (prequant.json) and SHA256SUMS. Weights of Linear layers and experts are quantized; embeddings, output heads, norms,
/// biases and routers keep their dtype.
#[derive(Args)]
pub struct Arguments {
    /// Checkpoint folder, or a single .safetensors file
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// Folder to create
    #[arg(value_name = "DST")]
    destination: PathBuf,

    #[arg(long, value_parser = quantize::formats(), help = format!("4-bit format [default: {}]", quantize::default_format()))]
    format: Option<&'static FormatSpec>,

    #[command(flatten)]
    quantize: quantize::Arguments,

    /// Decode weights that SRC has in 4 bits while reading, and quantize what they stand for. FP8 is decoded without this option
    #[arg(long)]
    dequantize_source: bool,

    /// Maximum size of the tensors in one output file [default: 5GB]
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<Bytes>,

    /// Memory limit, of everything but the GPU driver's own [default: 256MiB, more for sources of over 190,000 tensors]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,

    /// Number of threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    #[command(flatten)]
    device: device::Arguments,

    /// Record the SHA-256 of the source's files in the manifest; reads them a second time
    #[arg(long)]
    hash_source: bool,

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
    #[arg(long, value_name = "FILE", conflicts_with = "dry_run")]
    trace: Option<PathBuf>,

    /// Print the decision for every tensor and its reason; write nothing
    #[arg(long)]
    dry_run: bool,

    /// Print a single JSON object on standard output
    #[arg(long)]
    json: bool,

    /// Print errors only
    #[arg(long, short)]
    quiet: bool,
}

impl Arguments {
    /// What was given; where nothing was, the recipe that a converted SRC has, or the default.
    fn recipe(&self) -> Result<Recipe, Error> {
        let given = RecipeOptions {
            format: self.format,
            dequantize_source: self.dequantize_source.then_some(true),
            max_shard_size: self.max_shard_size.map(|size| size.0),
            ..self.quantize.options()
        };
        match recipe_of(&self.source)? {
            Some(base) => given.or(&base).build(),
            None => given.build(),
        }
    }

    fn options(&self) -> Options {
        let default = Options::default();
        Options {
            memory: self.memory.map(|memory| memory.0),
            threads: self.threads.map_or(default.threads, NonZeroUsize::get),
            device: self.device.device.clone().into(),
            device_memory: self.device.device_memory.0,
            hash_source: self.hash_source,
            force: self.force,
            restart: self.restart,
            follow_links: self.follow_links,
            trace: None,
        }
    }

    fn audience(&self) -> Audience {
        match (self.json, self.quiet) {
            (true, _) => Audience::Machines,
            (false, true) => Audience::Nobody,
            (false, false) => Audience::People,
        }
    }

    fn style(&self) -> Style {
        if self.quiet { Style::Silent } else { Style::of_stderr() }
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> ExitCode {
    output::finish(convert(arguments), arguments.json)
}

fn convert(arguments: &Arguments) -> Result<Outcome, Error> {
    let start = Instant::now();
    let recipe = arguments.recipe()?;
    let mut conversion = plan(&arguments.source, recipe, arguments.options())?;
    if arguments.dry_run {
        return Ok(dry_run::report(&conversion, &arguments.destination, arguments.audience()));
    }
    let tracing = Tracing::start(arguments.trace.as_deref(), &[&arguments.source, &arguments.destination])?;
    conversion.options.trace = tracing.trace();
    if let Audience::People = arguments.audience() {
        tell(format_args!("{}; memory: at most {}", device::line(&conversion.device), Limit(conversion.budget.memory)));
    }
    if !arguments.quiet {
        for warning in &conversion.plan.warnings {
            tell(format_args!("warning: {}", hints::shown_warning(warning)));
        }
    }
    match if arguments.force { Ok(None) } else { conversion.finished(&arguments.destination) } {
        Ok(None) => {}
        Ok(Some(Finished { manifest, weights_compared })) => {
            let done =
                summary::Done { conversion: &conversion, destination: &arguments.destination, manifest: &manifest };
            return Ok(done.already(weights_compared, arguments.audience()));
        }
        // What an earlier run left, finished, of a source that is another by now.
        Err(Error::Outdated { .. }) if arguments.restart => conversion.options.force = true,
        Err(error) => return Err(error),
    }
    let reporter = Reporter::new(arguments.style(), &conversion.plan);
    let manifest = conversion.execute_until(interrupt::flag(), &arguments.destination, &reporter)?;
    reporter.finish();
    let done = summary::Done { conversion: &conversion, destination: &arguments.destination, manifest: &manifest };
    if !arguments.quiet {
        done.warnings().iter().for_each(|warning| tell(format_args!("warning: {warning}")));
    }
    Ok(done.report(start.elapsed(), arguments.audience()))
}
