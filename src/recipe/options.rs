//! Options as they are given, by a command line or in a manifest, and the recipe that they make.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{ExpertLayout, Guard, NonFinitePolicy, Recipe, Weights};
use crate::error::{Error, Hint, Result, Setting};
use crate::format::{BlockSize, FORMATS, FormatSpec, GroupSize, Layout, NF4, QuantStorage, Sharing};

/// Options of a conversion; what isn't given is the default. A recipe stands in the manifest as all those that apply to it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RecipeOptions {
    /// The 4-bit format.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "FormatSpec")]
    pub format: Option<&'static FormatSpec>,
    /// Present if nothing is quantized: weights stay floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool", extend("const" = true))]
    pub unquantized: Option<bool>,
    /// Consecutive elements that share one absmax, in formats with blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "BlockSize")]
    pub block_size: Option<BlockSize>,
    /// Whether absmax is quantized too, to 8 bits, in formats with blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool")]
    pub double_quant: Option<bool>,
    /// The dtype that codes are stored as, in formats with blocks; present if they aren't bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "QuantStorage")]
    pub quant_storage: Option<QuantStorage>,
    /// How weights with a NaN or an infinity are treated, in formats with blocks.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "NonFinitePolicy")]
    pub nonfinite: Option<NonFinitePolicy>,
    /// How the experts of a Mixture-of-Experts model are laid out, in formats with blocks; others have them one by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "ExpertLayout")]
    pub experts: Option<ExpertLayout>,
    /// Columns that share one scale, in formats with groups that leave the choice; others have a fixed size.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "GroupSize")]
    pub group_size: Option<GroupSize>,
    /// The tensors that formats with groups are put in.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Layout")]
    pub layout: Option<Layout>,
    /// Whether everything but experts is kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool")]
    pub only_experts: Option<bool>,
    /// Regular expressions: tensors to quantize although the rules would keep them.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Vec<String>")]
    pub include: Option<Vec<String>>,
    /// Regular expressions: tensors to keep, whatever else says otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Vec<String>")]
    pub exclude: Option<Vec<String>>,
    /// Present if weights that the source has in 4 bits were decoded first.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "bool", extend("const" = true))]
    pub dequantize_source: Option<bool>,
    /// What stops clients that would load experts wrongly; present if it isn't `auto`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Guard")]
    pub guard: Option<Guard>,
    /// The most bytes of tensors in one file; a weight and its scales stay together even if they exceed it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "u64")]
    pub max_shard_size: Option<u64>,
}

impl RecipeOptions {
    /// With the options of `base` where none is given; if another format is given, without those that are of a format.
    pub fn or(self, base: &Recipe) -> RecipeOptions {
        let mut base = RecipeOptions::from(base.clone());
        if self.format.is_some() && self.format != base.format {
            let RecipeOptions { only_experts, include, exclude, dequantize_source, guard, max_shard_size, .. } = base;
            let rest = RecipeOptions::default();
            base = RecipeOptions { only_experts, include, exclude, dequantize_source, guard, max_shard_size, ..rest };
        }
        RecipeOptions {
            format: self.format.or(base.format),
            unquantized: self.unquantized,
            block_size: self.block_size.or(base.block_size),
            double_quant: self.double_quant.or(base.double_quant),
            quant_storage: self.quant_storage.or(base.quant_storage),
            nonfinite: self.nonfinite.or(base.nonfinite),
            experts: self.experts.or(base.experts),
            group_size: self.group_size.or(base.group_size),
            layout: self.layout.or(base.layout),
            only_experts: self.only_experts.or(base.only_experts),
            include: self.include.or(base.include),
            exclude: self.exclude.or(base.exclude),
            dequantize_source: self.dequantize_source.or(base.dequantize_source),
            guard: self.guard.or(base.guard),
            max_shard_size: self.max_shard_size.or(base.max_shard_size),
        }
    }

    /// The recipe that they make.
    ///
    /// # Errors
    /// When one doesn't apply to the format, or two don't go together.
    pub fn build(self) -> Result<Recipe> {
        if self.unquantized == Some(true) {
            return Ok(Recipe::floats(self.max_shard_size.unwrap_or(Recipe::default().max_shard_size)));
        }
        let format = self.format.unwrap_or(&NF4);
        let weights = match format.sharing {
            Sharing::Blocks => self.blocks(format)?,
            Sharing::Groups => self.groups(format, self.group_size.unwrap_or_default())?,
            Sharing::GroupsOf(columns) => {
                self.refuse_unless(self.group_size.is_none(), Setting::GroupSize, None, has_group_size)?;
                self.groups(format, GroupSize::Columns(columns))?
            }
        };
        let default = Recipe::default();
        Ok(Recipe {
            weights,
            only_experts: self.only_experts.unwrap_or(default.only_experts),
            include: self.include.unwrap_or(default.include),
            exclude: self.exclude.unwrap_or(default.exclude),
            dequantize_source: self.dequantize_source.unwrap_or(default.dequantize_source),
            guard: self.guard.unwrap_or(default.guard),
            max_shard_size: self.max_shard_size.unwrap_or(default.max_shard_size),
        })
    }

    fn blocks(&self, format: &'static FormatSpec) -> Result<Weights> {
        self.refuse_unless(self.layout.is_none(), Setting::Layout, None, |format| !has_blocks(format))?;
        self.refuse_unless(self.group_size.is_none(), Setting::GroupSize, None, has_group_size)?;
        let double_quant = self.double_quant.unwrap_or_default();
        let nonfinite = self.nonfinite.unwrap_or_default();
        if double_quant && nonfinite == NonFinitePolicy::Keep {
            let why =
                "can't be used where NaN and infinities are kept: one such value would spoil the scales of 256 blocks";
            let (setting, hint) = (Setting::DoubleQuant, Some(Hint::Remove(Setting::NonFinite)));
            return Err(Error::Options { setting, value: None, why: why.to_owned(), hint });
        }
        let (block_size, experts) = (self.block_size.unwrap_or_default(), self.experts.unwrap_or_default());
        let quant_storage = self.quant_storage.unwrap_or_default();
        Ok(Weights::Blocks { format, block_size, double_quant, quant_storage, nonfinite, experts })
    }

    fn groups(&self, format: &'static FormatSpec, group_size: GroupSize) -> Result<Weights> {
        self.refuse_unless(self.block_size.is_none(), Setting::BlockSize, None, has_blocks)?;
        self.refuse_unless(self.double_quant != Some(true), Setting::DoubleQuant, None, has_blocks)?;
        self.refuse_unless(self.quant_storage.is_none(), Setting::QuantStorage, None, has_blocks)?;
        let keeps_nonfinite = self.nonfinite == Some(NonFinitePolicy::Keep);
        self.refuse_unless(!keeps_nonfinite, Setting::NonFinite, Some("keep"), has_blocks)?;
        let fuses = self.experts == Some(ExpertLayout::Fuse);
        self.refuse_unless(!fuses, Setting::Experts, Some("fuse"), has_blocks)?;
        let layout = self.layout.or(format.layouts.first().copied()).unwrap_or_default();
        let has_layout = |format: &FormatSpec| format.layouts.contains(&layout);
        self.refuse_unless(has_layout(format), Setting::Layout, Some(layout.name()), has_layout)?;
        Ok(Weights::Groups { format, group_size, layout })
    }

    /// The formats that a setting applies to, in words: `nf4 and fp4`.
    pub fn formats_with(setting: Setting) -> String {
        FormatSpec::names_with(|format| match setting {
            Setting::BlockSize
            | Setting::DoubleQuant
            | Setting::QuantStorage
            | Setting::NonFinite
            | Setting::Experts => has_blocks(format),
            Setting::GroupSize => has_group_size(format),
            Setting::Layout => !has_blocks(format),
            Setting::Include | Setting::Exclude | Setting::DequantizeSource => true,
        })
    }

    /// Refuses an option that is of other formats.
    fn refuse_unless(
        &self,
        fits: bool,
        setting: Setting,
        value: Option<&'static str>,
        has: impl Fn(&FormatSpec) -> bool,
    ) -> Result<()> {
        if fits {
            return Ok(());
        }
        let why = format!("applies to {} only", FormatSpec::names_with(has));
        let hint = Some(Hint::RemoveFor(self.format.unwrap_or(&NF4).name));
        Err(Error::Options { setting, value, why, hint })
    }
}

fn has_blocks(format: &FormatSpec) -> bool {
    format.sharing == Sharing::Blocks
}

fn has_group_size(format: &FormatSpec) -> bool {
    format.sharing == Sharing::Groups
}

impl From<Recipe> for RecipeOptions {
    /// All that apply, and no other.
    fn from(recipe: Recipe) -> RecipeOptions {
        let of_weights = match recipe.weights {
            Weights::Blocks { block_size, double_quant, quant_storage, nonfinite, experts, .. } => RecipeOptions {
                block_size: Some(block_size),
                double_quant: Some(double_quant),
                quant_storage: (quant_storage != QuantStorage::Uint8).then_some(quant_storage),
                nonfinite: Some(nonfinite),
                experts: Some(experts),
                ..RecipeOptions::default()
            },
            Weights::Groups { format, group_size, layout } => {
                let group_size = has_group_size(format).then_some(group_size);
                RecipeOptions { group_size, layout: Some(layout), ..RecipeOptions::default() }
            }
            Weights::Floats => {
                let max_shard_size = Some(recipe.max_shard_size);
                return RecipeOptions { unquantized: Some(true), max_shard_size, ..RecipeOptions::default() };
            }
        };
        RecipeOptions {
            format: recipe.format(),
            only_experts: Some(recipe.only_experts),
            include: Some(recipe.include),
            exclude: Some(recipe.exclude),
            dequantize_source: recipe.dequantize_source.then_some(true),
            guard: (recipe.guard != Guard::Auto).then_some(recipe.guard),
            max_shard_size: Some(recipe.max_shard_size),
            ..of_weights
        }
    }
}

impl TryFrom<RecipeOptions> for Recipe {
    type Error = String;

    /// Of a manifest, which has all that apply.
    fn try_from(given: RecipeOptions) -> Result<Recipe, String> {
        let recipe = given.clone().build().map_err(|error| error.to_string())?;
        let expected = RecipeOptions::from(recipe.clone());
        if given == expected {
            return Ok(recipe);
        }
        let keys = |options: &RecipeOptions| -> Vec<String> {
            let object = json!(options);
            object.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect()
        };
        let format = recipe.format().map_or("unquantized weights", |format| format.name);
        Err(format!("a recipe of {format} with {:?}, expected {:?}", keys(&given), keys(&expected)))
    }
}

impl JsonSchema for Recipe {
    fn schema_name() -> Cow<'static, str> {
        "Recipe".into()
    }

    /// The keys that any recipe may have, and one case for each format, of those that it has.
    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let mut schema = RecipeOptions::json_schema(generator);
        schema.insert("description".to_owned(), "The choices of a conversion: those that apply to its format.".into());
        let known: Vec<String> = schema
            .get("properties")
            .and_then(Value::as_object)
            .into_iter()
            .flatten()
            .map(|(key, _)| key.clone())
            .collect();
        let of_formats = FORMATS.iter().map(|format| case(format, &known));
        schema.insert("oneOf".to_owned(), of_formats.chain([case_of_floats(&known)]).collect());
        schema
    }
}

/// What a recipe must have by which nothing is quantized, and must not.
fn case_of_floats(known: &[String]) -> Value {
    let written = json!(Recipe::floats(0));
    let (required, others): (Vec<&String>, Vec<&String>) = known.iter().partition(|key| written.get(key).is_some());
    let properties: serde_json::Map<_, _> = others.into_iter().map(|key| (key.clone(), false.into())).collect();
    json!({"properties": properties, "required": required})
}

/// What a recipe of a format must have, and must not.
fn case(format: &'static FormatSpec, known: &[String]) -> Value {
    let written = json!(RecipeOptions { format: Some(format), ..RecipeOptions::default() }.build().ok());
    let mut properties = serde_json::Map::new();
    properties.insert("format".to_owned(), json!({"const": format}));
    if !format.layouts.is_empty() {
        properties.insert("layout".to_owned(), json!({"enum": format.layouts}));
    }
    let (required, others): (Vec<&String>, Vec<&String>) = known.iter().partition(|key| written.get(key).is_some());
    // What is written only if it isn't the default.
    let is_optional = |key: &str| match key {
        "dequantize_source" | "guard" => true,
        key => key == "quant_storage" && has_blocks(format),
    };
    properties.extend(others.into_iter().filter(|key| !is_optional(key)).map(|key| (key.clone(), false.into())));
    json!({"properties": properties, "required": required})
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The JSON of the recipe that flags of a format make.
    fn written(options: Value) -> Value {
        let options: RecipeOptions = serde_json::from_value(options).unwrap();
        json!(options.build().unwrap())
    }

    #[test]
    fn a_recipe_is_written_with_what_applies_to_its_format_and_no_more() {
        let rest = json!({"only_experts": false, "include": [], "exclude": [], "max_shard_size": 5_000_000_000_u64});
        let blocks = json!({"block_size": 64, "double_quant": false, "nonfinite": "error", "experts": "keep"});
        let layout = json!({"layout": "compressed-tensors"});
        for (format, own) in [
            ("nf4", blocks.clone()),
            ("fp4", blocks),
            ("int4", json!({"group_size": 128, "layout": "compressed-tensors"})),
            ("int4-asym", json!({"group_size": 128, "layout": "compressed-tensors"})),
            ("mxfp4", layout.clone()),
            ("nvfp4", layout),
        ] {
            let mut expected = json!({"format": format});
            for part in [&own, &rest] {
                expected.as_object_mut().unwrap().extend(part.as_object().unwrap().clone());
            }
            let found = written(json!({"format": format}));
            assert_eq!(found, expected);
            assert_eq!(json!(serde_json::from_value::<Recipe>(found).unwrap()), expected);
        }
        let floats = json!({"unquantized": true, "max_shard_size": 1000});
        assert_eq!(json!(serde_json::from_value::<Recipe>(floats.clone()).unwrap()), floats);
        let mut too_much = floats;
        too_much["format"] = json!("nf4");
        assert!(serde_json::from_value::<Recipe>(too_much).is_err());
        assert_eq!(written(json!({"dequantize_source": true}))["dequantize_source"], true);
        assert_eq!(written(json!({"quant_storage": "bfloat16"}))["quant_storage"], "bfloat16");
        assert!(written(json!({"quant_storage": "uint8"})).get("quant_storage").is_none());
        assert_eq!(written(json!({"guard": "off"}))["guard"], "off");
        assert!(written(json!({"format": "int4", "guard": "auto"})).get("guard").is_none());
    }

    #[test]
    fn a_recipe_with_too_much_or_too_little_is_not_read() {
        let read = |format: &str, change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
            let mut recipe = written(json!({"format": format}));
            change(recipe.as_object_mut().unwrap());
            serde_json::from_value::<Recipe>(recipe).map_err(|error| error.to_string())
        };
        assert!(read("nf4", &|_| {}).is_ok());
        for (format, key, value, word) in [
            ("nf4", "group_size", json!(128), "group_size applies to int4"),
            ("nf4", "layout", json!("compressed-tensors"), "layout applies to int4"),
            ("int4", "block_size", json!(64), "block_size applies to nf4"),
            ("int4", "experts", json!("keep"), "expected"),
            ("int4", "double_quant", json!(false), "expected"),
            ("int4", "quant_storage", json!("bfloat16"), "quant_storage applies to nf4"),
            ("nf4", "quant_storage", json!("uint8"), "expected"),
            ("nf4", "quant_storage", json!("int8"), "unknown variant"),
            ("mxfp4", "layout", json!("modelopt"), "layout modelopt applies to nvfp4"),
            ("nvfp4", "group_size", json!(32), "group_size applies to int4"),
            ("nf4", "speed", json!(1), "unknown field `speed`"),
            ("nf4", "dequantize_source", json!(false), "expected"),
        ] {
            let error = read(format, &|recipe| drop(recipe.insert(key.to_owned(), value.clone()))).unwrap_err();
            assert!(error.contains(word), "{format} {key}: {error}");
        }
        for (format, key) in [("nf4", "block_size"), ("int4", "group_size"), ("nvfp4", "layout"), ("nf4", "format")] {
            assert!(read(format, &|recipe| drop(recipe.remove(key))).is_err(), "{format} without {key}");
        }
    }

    #[test]
    fn formats_are_named_with_each_setting_that_they_have() {
        assert_eq!(RecipeOptions::formats_with(Setting::DoubleQuant), "nf4 and fp4");
        assert_eq!(RecipeOptions::formats_with(Setting::GroupSize), "int4 and int4-asym");
        let layouts = RecipeOptions::formats_with(Setting::Layout);
        assert!(layouts.starts_with("int4, int4-asym, mxfp4") && layouts.contains(" and "), "{layouts}");
    }

    #[test]
    fn options_go_on_top_of_a_recipe_of_their_format() {
        let base = RecipeOptions { block_size: 32.try_into().ok(), only_experts: Some(true), ..Default::default() };
        let base = base.build().unwrap();
        let fused = RecipeOptions { experts: Some(ExpertLayout::Fuse), ..Default::default() };
        let on_top = fused.or(&base).build().unwrap();
        assert!(on_top.fuses_experts() && on_top.only_experts);
        assert_eq!(json!(on_top)["block_size"], 32);
        let other = RecipeOptions { format: Some(FORMATS[2]), ..Default::default() };
        assert_eq!(other.or(&base).build().unwrap().format(), Some(FORMATS[2]));
    }
}
