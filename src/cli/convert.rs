//! `prequant convert`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use prequant::{
    BlockSize, Bytes, Error, ExpertLayout, FORMATS, Finished, FormatSpec, GroupSize, Guard, Layout, NonFinitePolicy,
    Options, QuantStorage, Recipe, RecipeOptions, Setting, plan, recipe_of,
};

use super::output::{self, Audience, Outcome};
use super::progress::{Reporter, Style};
use super::streams::tell;
use super::trace::Tracing;
use super::words::Limit;
use super::{device, dry_run, hints, interrupt, summary};

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

    #[arg(long, value_parser = formats(), help = format!("4-bit format [default: {}]", Recipe::default().format().name))]
    format: Option<&'static FormatSpec>,

    #[arg(long, value_name = "N", help = about_block_size())]
    block_size: Option<BlockSize>,

    #[arg(long, value_name = "N", help = about_group_size())]
    group_size: Option<GroupSize>,

    #[arg(long, value_parser = layouts(), help = about_layout())]
    layout: Option<Layout>,

    #[arg(long, help = about_double_quant())]
    double_quant: bool,

    #[arg(long, value_name = "DTYPE", value_parser = storages(), help = about_quant_storage())]
    quant_storage: Option<QuantStorage>,

    /// How the experts of a Mixture-of-Experts model are stored [default: keep]
    ///
    /// If SRC was converted by prequant, its experts are rewritten in the other layout without quantizing again.
    #[arg(long, value_enum)]
    experts: Option<ExpertsArg>,

    /// Quantize experts only
    #[arg(long)]
    only_experts: bool,

    /// Also quantize tensors matching REGEX that the default rules would leave unquantized; repeatable
    #[arg(long, value_name = "REGEX")]
    include: Vec<String>,

    /// Never quantize tensors matching REGEX; overrides every other option; repeatable
    #[arg(long, value_name = "REGEX")]
    exclude: Vec<String>,

    /// Decode weights that SRC has in 4 bits while reading, and quantize what they stand for. FP8 is decoded without this option
    #[arg(long)]
    dequantize_source: bool,

    /// What config.json has to stop transformers where it would load 4-bit experts wrongly [default: auto]
    #[arg(long, value_enum)]
    guard: Option<GuardArg>,

    /// How to treat NaN or infinite weights [default: error]
    #[arg(long, value_enum)]
    nonfinite: Option<NonFiniteArg>,

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

fn about_block_size() -> String {
    let (formats, default) = (RecipeOptions::formats_with(Setting::BlockSize), BlockSize::default());
    format!(
        "Block size for {formats}: how many weights share one scale, a power of two from 32 to 4096. Smaller blocks are more \
         accurate and take more space [default: {default}]"
    )
}

fn about_group_size() -> String {
    let (formats, default) = (RecipeOptions::formats_with(Setting::GroupSize), GroupSize::default());
    format!(
        "Group size for {formats}: how many columns share one scale: 32, 64, 128, or channel for the whole row [default: \
         {default}]"
    )
}

fn about_layout() -> String {
    let (formats, default) = (RecipeOptions::formats_with(Setting::Layout), Layout::default().name());
    format!("On-disk tensor layout of {formats}; pick the one your runtime reads [default: {default}]")
}

fn about_double_quant() -> String {
    let formats = RecipeOptions::formats_with(Setting::DoubleQuant);
    format!("Also quantize the scales of {formats}, to 8 bits: saves 0.37 bits per weight, slightly less accurate")
}

fn about_quant_storage() -> String {
    let formats = RecipeOptions::formats_with(Setting::QuantStorage);
    format!(
        "Dtype of the codes of {formats} on disk; their bytes are the same. FSDP1 needs that of the other weights [default: uint8]"
    )
}

/// What `--quant-storage` takes.
fn storages() -> impl TypedValueParser<Value = QuantStorage> {
    PossibleValuesParser::new(QuantStorage::ALL.map(QuantStorage::name)).try_map(|name| name.parse::<QuantStorage>())
}

/// What `--format` takes.
fn formats() -> impl TypedValueParser<Value = &'static FormatSpec> {
    let values = FORMATS.iter().map(|format| PossibleValue::new(format.name).help(format.about));
    PossibleValuesParser::new(values).try_map(|name| name.parse())
}

/// What `--layout` takes.
fn layouts() -> impl TypedValueParser<Value = Layout> {
    let value = |layout: Layout| {
        PossibleValue::new(layout.name()).help(format!("{}; for {}", layout.about(), layout.formats()))
    };
    let values = Layout::all().into_iter().map(value);
    PossibleValuesParser::new(values).try_map(|name| name.parse())
}

#[derive(Clone, Copy, ValueEnum)]
enum NonFiniteArg {
    /// Stop and name the tensor
    Error,
    /// Quantize them as bitsandbytes does: their whole block decodes to NaN and infinities
    Keep,
}

#[derive(Clone, Copy, ValueEnum)]
enum GuardArg {
    /// What stops nobody else, where transformers would say nothing: experts it doesn't put together, and NVFP4 ones
    Auto,
    /// Also stop it at NF4 and FP4 experts when told to ignore shapes; locks out unsloth and from_config
    Strict,
    /// Nothing
    Off,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExpertsArg {
    /// Unchanged, under the source's names
    Keep,
    /// Fused as transformers 5 loads them: one 3-D tensor per projection with all experts of a layer
    Fuse,
}

impl Arguments {
    /// What was given; where nothing was, the recipe that a converted SRC has, or the default.
    fn recipe(&self) -> Result<Recipe, Error> {
        let patterns = |given: &Vec<String>| Some(given).filter(|given| !given.is_empty()).cloned();
        let given = RecipeOptions {
            format: self.format,
            block_size: self.block_size,
            group_size: self.group_size,
            layout: self.layout,
            double_quant: self.double_quant.then_some(true),
            quant_storage: self.quant_storage,
            experts: self.experts.map(|experts| match experts {
                ExpertsArg::Keep => ExpertLayout::Keep,
                ExpertsArg::Fuse => ExpertLayout::Fuse,
            }),
            guard: self.guard.map(|guard| match guard {
                GuardArg::Auto => Guard::Auto,
                GuardArg::Strict => Guard::Strict,
                GuardArg::Off => Guard::Off,
            }),
            only_experts: self.only_experts.then_some(true),
            include: patterns(&self.include),
            exclude: patterns(&self.exclude),
            dequantize_source: self.dequantize_source.then_some(true),
            nonfinite: self.nonfinite.map(|policy| match policy {
                NonFiniteArg::Error => NonFinitePolicy::Error,
                NonFiniteArg::Keep => NonFinitePolicy::Keep,
            }),
            max_shard_size: self.max_shard_size.map(|size| size.0),
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
