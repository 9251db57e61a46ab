//! `prequant convert`.

use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::{Args, ValueEnum};
use prequant::Error;
use prequant::format::{BlockSize, Format, GroupSize, Layout};
use prequant::ops::quantize::{Options, plan};
use prequant::ops::recipe_of;
use prequant::recipe::{ExpertLayout, NonFinitePolicy, Recipe, RecipeOptions};
use prequant::store::RealDisk;
use prequant::units::Bytes;

use super::output::{self, Outcome};
use super::progress::{Reporter, Style};
use super::{device, dry_run, interrupt, summary};

/// Quantize a checkpoint to 4 bits.
///
/// SRC is a folder with config.json and safetensors files, as downloaded from the Hugging Face hub, or one safetensors
/// file. DST becomes a complete checkpoint that loads as it is: 4-bit weights, config.json, tokenizer and all other
/// files, a manifest (prequant.json) and SHA256SUMS. Weights of Linear layers and experts are quantized; embeddings,
/// output heads, norms, biases and routers keep their dtype.
#[derive(Args)]
pub struct Arguments {
    /// The checkpoint's folder, or one .safetensors file
    #[arg(value_name = "SRC")]
    source: PathBuf,

    /// The folder to be made
    #[arg(value_name = "DST")]
    destination: PathBuf,

    /// The 4-bit format [default: nf4]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,

    /// Weights that share one scale in nf4 and fp4: a power of two from 32 to 4096. Fewer is more exact and takes more room [default: 64]
    #[arg(long, value_name = "N")]
    block_size: Option<BlockSize>,

    /// Columns that share one scale in int4 and int4-asym: 32, 64 or 128, or channel for all of a row [default: 128]
    #[arg(long, value_name = "N")]
    group_size: Option<GroupSize>,

    /// The tensors that int4, mxfp4 and nvfp4 are put in: who reads them [default: compressed-tensors]
    #[arg(long, value_enum)]
    layout: Option<LayoutArg>,

    /// Quantize the scales too, to 8 bits: 0.37 bits a weight less, slightly less exact
    #[arg(long)]
    double_quant: bool,

    /// How the experts of a Mixture-of-Experts model are laid out [default: keep]
    ///
    /// If SRC is a checkpoint that prequant converted, its experts are laid out anew, without quantizing again.
    #[arg(long, value_enum)]
    experts: Option<ExpertsArg>,

    /// Keep everything but experts
    #[arg(long)]
    only_experts: bool,

    /// Quantize the tensors whose names match, against the rules; may be given more than once
    #[arg(long, value_name = "REGEX")]
    include: Vec<String>,

    /// Keep the tensors whose names match, before all other options; may be given more than once
    #[arg(long, value_name = "REGEX")]
    exclude: Vec<String>,

    /// Decode gpt-oss's MXFP4 experts on the way in. FP8 in blocks (DeepSeek-V3's) is decoded without it
    #[arg(long)]
    dequantize_source: bool,

    /// What becomes of weights with a NaN or an infinity [default: error]
    #[arg(long, value_enum)]
    nonfinite: Option<NonFiniteArg>,

    /// The most bytes of tensors in one output file [default: 5GB]
    #[arg(long, value_name = "SIZE")]
    max_shard_size: Option<Bytes>,

    /// The most memory to use
    #[arg(long, value_name = "SIZE", default_value = "256MiB")]
    memory: Bytes,

    /// Threads to use [default: all cores]
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,

    #[command(flatten)]
    device: device::Arguments,

    /// Put the SHA-256 of the source's files into the manifest; they are read once more for it
    #[arg(long)]
    hash_source: bool,

    /// Replace the checkpoint in DST
    #[arg(long)]
    force: bool,

    /// Discard what an earlier, unfinished run left in DST, rather than go on with it
    #[arg(long)]
    restart: bool,

    /// Show what would become of every tensor, and why; write nothing
    #[arg(long)]
    dry_run: bool,

    /// Print one JSON object at the end, and no other line on standard output
    #[arg(long)]
    json: bool,

    /// Print nothing but errors
    #[arg(long, short)]
    quiet: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum FormatArg {
    /// 4-bit NormalFloat, as QLoRA uses it
    Nf4,
    /// bitsandbytes' 4-bit float
    Fp4,
    /// Integers with a scale for each group of columns: compressed-tensors' W4A16
    Int4,
    /// The same with a zero point for each group: compressed-tensors' W4A16_ASYM
    Int4Asym,
    /// 4-bit floats with a power of two for each 32 columns: compressed-tensors' MXFP4A16
    Mxfp4,
    /// 4-bit floats with an 8-bit float for each 16 columns: compressed-tensors' NVFP4A16
    Nvfp4,
}

#[derive(Clone, Copy, ValueEnum)]
enum LayoutArg {
    /// compressed-tensors': vLLM and transformers read it
    CompressedTensors,
    /// ModelOpt's, of nvfp4: vLLM and axolotl's NVFP4 LoRA read it
    Modelopt,
    /// gpt-oss's own, of mxfp4: its experts as its checkpoint on the hub has them, and all else in its dtype
    GptOss,
}

#[derive(Clone, Copy, ValueEnum)]
enum NonFiniteArg {
    /// They are an error
    Error,
    /// They are quantized as bitsandbytes does: their whole block decodes to NaN and infinities
    Keep,
}

#[derive(Clone, Copy, ValueEnum)]
enum ExpertsArg {
    /// As the source has them, under the same names
    Keep,
    /// As transformers 5's models have them: all of a layer's in one 3-D tensor for each projection
    Fuse,
}

impl Arguments {
    /// What was given; where nothing was, the recipe that a converted SRC has, or the default.
    fn recipe(&self) -> Result<Recipe, Error> {
        let patterns = |given: &Vec<String>| Some(given).filter(|given| !given.is_empty()).cloned();
        let given = RecipeOptions {
            format: self.format.map(|format| match format {
                FormatArg::Nf4 => Format::Nf4,
                FormatArg::Fp4 => Format::Fp4,
                FormatArg::Int4 => Format::Int4,
                FormatArg::Int4Asym => Format::Int4Asym,
                FormatArg::Mxfp4 => Format::Mxfp4,
                FormatArg::Nvfp4 => Format::Nvfp4,
            }),
            block_size: self.block_size,
            group_size: self.group_size,
            layout: self.layout.map(|layout| match layout {
                LayoutArg::CompressedTensors => Layout::CompressedTensors,
                LayoutArg::Modelopt => Layout::Modelopt,
                LayoutArg::GptOss => Layout::GptOss,
            }),
            double_quant: self.double_quant.then_some(true),
            experts: self.experts.map(|experts| match experts {
                ExpertsArg::Keep => ExpertLayout::Keep,
                ExpertsArg::Fuse => ExpertLayout::Fuse,
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

    fn options(&self, device: &device::Opened) -> Options {
        let default = Options::default();
        Options {
            memory: self.memory.0,
            threads: self.threads.map_or(default.threads, NonZeroUsize::get),
            device: device.device.clone(),
            device_memory: device.device_memory,
            hash_source: self.hash_source,
            force: self.force,
            restart: self.restart,
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

/// To whom a report is addressed.
#[derive(Clone, Copy)]
pub enum Audience {
    People,
    Machines,
    /// `--quiet`.
    Nobody,
}

fn convert(arguments: &Arguments) -> Result<Outcome, Error> {
    let start = Instant::now();
    let recipe = arguments.recipe()?;
    let device = arguments.device.open()?;
    let conversion = plan(&arguments.source, recipe, arguments.options(&device))?;
    if arguments.dry_run {
        return Ok(dry_run::report(&conversion, &arguments.destination, &device.line, arguments.audience()));
    }
    if let Audience::People = arguments.audience() {
        eprintln!("{}", device.line);
    }
    if !arguments.quiet {
        for warning in &conversion.plan.warnings {
            eprintln!("warning: {warning}");
        }
    }
    if !arguments.force
        && let Some(manifest) = conversion.finished(&arguments.destination)
    {
        let done = summary::Done { conversion: &conversion, destination: &arguments.destination, manifest: &manifest };
        return Ok(done.already(arguments.audience()));
    }
    let reporter = Reporter::new(arguments.style(), &conversion);
    let manifest = conversion.execute_on(&RealDisk, interrupt::flag(), &arguments.destination, &reporter)?;
    reporter.finish();
    let done = summary::Done { conversion: &conversion, destination: &arguments.destination, manifest: &manifest };
    Ok(done.report(start.elapsed(), arguments.audience()))
}
