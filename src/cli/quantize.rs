//! The options of a format, which `convert` and `merge` have in common.

use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use prequant::{
    BlockSize, ExpertLayout, FORMATS, FormatSpec, GroupSize, Guard, Layout, NonFinitePolicy, QuantStorage, Recipe,
    RecipeOptions, Setting,
};

#[derive(Args)]
#[group(skip)]
pub struct Arguments {
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

    /// What config.json has to stop transformers where it would load 4-bit experts wrongly [default: auto]
    #[arg(long, value_enum)]
    guard: Option<GuardArg>,

    /// How to treat NaN or infinite weights [default: error]
    #[arg(long, value_enum)]
    nonfinite: Option<NonFiniteArg>,
}

impl Arguments {
    /// What was given.
    pub fn options(&self) -> RecipeOptions {
        let patterns = |given: &Vec<String>| Some(given).filter(|given| !given.is_empty()).cloned();
        RecipeOptions {
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
            nonfinite: self.nonfinite.map(|policy| match policy {
                NonFiniteArg::Error => NonFinitePolicy::Error,
                NonFiniteArg::Keep => NonFinitePolicy::Keep,
            }),
            ..RecipeOptions::default()
        }
    }
}

/// The format that is taken where none is given.
pub fn default_format() -> &'static str {
    Recipe::default().format().map_or("none", |format| format.name)
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
pub fn formats() -> impl TypedValueParser<Value = &'static FormatSpec> {
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
