//! `prequant merge`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Args;
use clap::error::ErrorKind;
use prequant::{Bytes, Conversion, Error, Finished, FormatSpec, Options, Recipe, RecipeOptions, plan_merge};

use super::output::{self, Audience, Outcome};
use super::progress::{Reporter, Style};
use super::streams::tell;
use super::trace::Tracing;
use super::words::Limit;
use super::{device, dry_run, hints, interrupt, quantize, summary};

/// Merge a LoRA adapter into a checkpoint.
///
/// BASE is a checkpoint's folder; ADAPTER is the folder that PEFT, axolotl or unsloth saved a LoRA or rsLoRA adapter in
/// (adapter_config.json and adapter_model.safetensors). DST becomes a complete checkpoint with the dtypes that BASE has, or with
/// --format one that is quantized: the same bytes as merging first and converting the result. Changes are computed in f64 and
/// rounded once. Weights that BASE has quantized are decoded first.
#[derive(Args)]
pub struct Arguments {
    /// Folder of the checkpoint that the adapter was trained on
    #[arg(value_name = "BASE")]
    base: PathBuf,

    /// Folder of the adapter
    #[arg(value_name = "ADAPTER")]
    adapter: PathBuf,

    /// Folder to create
    #[arg(value_name = "DST")]
    destination: PathBuf,

    /// 4-bit format to quantize the merged weights to [default: none, they keep BASE's dtype]
    #[arg(long, value_parser = quantize::formats())]
    format: Option<&'static FormatSpec>,

    #[command(flatten)]
    quantize: quantize::Arguments,

    /// Maximum size of the tensors in one output file
    #[arg(long, value_name = "SIZE", default_value = "5GB")]
    max_shard_size: Bytes,

    /// Memory limit, of everything but the GPU driver's own [default: 256MiB, more for sources of over 190,000 tensors]
    #[arg(long, value_name = "SIZE")]
    memory: Option<Bytes>,

    /// Number of threads [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    #[command(flatten)]
    device: device::Arguments,

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

    /// Print what becomes of every tensor, and why; write nothing
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
    /// # Errors
    /// When options don't go together, or are of a format and none is given.
    fn recipe(&self) -> Result<Recipe, Error> {
        let max_shard_size = Some(self.max_shard_size.0);
        match self.format {
            Some(_) => RecipeOptions { format: self.format, max_shard_size, ..self.quantize.options() }.build(),
            None => Ok(Recipe::floats(self.max_shard_size.0)),
        }
    }

    fn options(&self) -> Options {
        let default = Options::default();
        Options {
            memory: self.memory.map(|memory| memory.0),
            threads: self.threads.map_or(default.threads, NonZeroUsize::get),
            device: self.device.device.clone().into(),
            device_memory: self.device.device_memory.0,
            force: self.force,
            restart: self.restart,
            follow_links: self.follow_links,
            ..default
        }
    }

    fn audience(&self) -> Audience {
        match (self.json, self.quiet) {
            (true, _) => Audience::Machines,
            (false, true) => Audience::Nobody,
            (false, false) => Audience::People,
        }
    }

    /// What is said before anything is written.
    fn announce(&self, conversion: &Conversion) {
        if let Audience::People = self.audience() {
            let memory = Limit(conversion.budget.memory);
            match self.format {
                Some(_) => tell(format_args!("{}; memory: at most {memory}", device::line(&conversion.device))),
                None => tell(format_args!("memory: at most {memory}")),
            }
        }
        if !self.quiet {
            let warnings = conversion.plan.warnings.iter();
            warnings.for_each(|warning| tell(format_args!("warning: {}", hints::shown_warning(warning))));
        }
    }
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> ExitCode {
    if arguments.format.is_none() && arguments.quantize.options() != RecipeOptions::default() {
        let message = "options of a format were given, and no --format: give one to quantize the merged weights\n";
        return output::usage(&clap::Error::raw(ErrorKind::MissingRequiredArgument, message), arguments.json);
    }
    output::finish(merge(arguments), arguments.json)
}

fn merge(arguments: &Arguments) -> Result<Outcome, Error> {
    let start = Instant::now();
    let Arguments { base, adapter, destination, .. } = arguments;
    let mut conversion = plan_merge(base, adapter, arguments.recipe()?, arguments.options())?;
    if arguments.dry_run {
        return Ok(dry_run::report(&conversion, destination, arguments.audience()));
    }
    let tracing = Tracing::start(arguments.trace.as_deref(), &[base, adapter, destination])?;
    conversion.options.trace = tracing.trace();
    arguments.announce(&conversion);
    match if arguments.force { Ok(None) } else { conversion.finished(destination) } {
        Ok(None) => {}
        Ok(Some(Finished { manifest, weights_compared })) => {
            let done = summary::Done { conversion: &conversion, destination, manifest: &manifest };
            return Ok(done.already(weights_compared, arguments.audience()));
        }
        // What an earlier run left, finished, of a base or an adapter that is another by now.
        Err(Error::Outdated { .. }) if arguments.restart => conversion.options.force = true,
        Err(error) => return Err(error),
    }
    let style = if arguments.quiet { Style::Silent } else { Style::of_stderr() };
    let reporter = Reporter::new(style, &conversion.plan);
    let manifest = conversion.execute_until(interrupt::flag(), destination, &reporter)?;
    reporter.finish();
    let done = summary::Done { conversion: &conversion, destination, manifest: &manifest };
    if !arguments.quiet {
        done.warnings().iter().for_each(|warning| tell(format_args!("warning: {warning}")));
    }
    Ok(done.report(start.elapsed(), arguments.audience()))
}
