//! Writing a checkpoint's weights back as floats: for merging adapters, or a look.
//!
//! What is read is a checkpoint that prequant converted; its manifest tells what is what. Decoding is an execution of a plan
//! like any other, in which all tensors are kept and some are read decoded.

use std::collections::{HashMap, HashSet};

use crate::backend::Device;
use crate::checkpoint::{CONFIG_NAME, MANIFEST_NAME, Source, TensorInfo};
use crate::dtype::FloatDtype;
use crate::error::{Error, IoContext, Result};
use crate::format::{Codec, Layout};
use crate::layout::{ParsedQuantState, compressed_tensors, quant_state_suffix};
use crate::manifest::{DecisionRecord, Manifest, TensorRecord};
use crate::ops::quantize::{Conversion, Options};
use crate::ops::relayout;
use crate::plan::input::{Input, as_stored, decoded, model_dtype};
use crate::plan::{MAX_EXPERTS, Plan, float_dtype, split};
use crate::read::{Decode, Nested, Read, Span};
use crate::recipe::Recipe;
use crate::store::{Location, ReadAt, read_exact_at};

/// What config.json says because of the 4-bit weights.
const CONFIG_KEYS: [&str; 2] = ["quantization_config", "experts_implementation"];

/// The longest quant_state that is read.
const MAX_QUANT_STATE: u64 = 1 << 16;

/// Plans the decoding of `converted`; reads headers and what is one number a tensor, and writes nothing.
///
/// # Errors
/// When it is no checkpoint that prequant converted, or isn't what its manifest says.
pub fn plan(converted: impl Into<Location>, max_shard_size: u64, mut options: Options) -> Result<Conversion> {
    let source = Source::open(converted)?;
    let Some(manifest) = relayout::manifest_of(&source.location)? else {
        let why = format!("it has no {MANIFEST_NAME}: give the folder of a checkpoint that prequant converted");
        return Err(Error::NotACheckpoint { path: source.location.path().to_owned(), why });
    };
    let (inputs, left_apart) = Converted::new(&source, &manifest).inputs()?;
    let config = source.config.as_ref().map(|config| config.without(&CONFIG_KEYS)).transpose();
    let config =
        config.map_err(|error| Error::malformed(source.location.join(CONFIG_NAME).path(), error.to_string()))?;
    let recipe = Recipe { max_shard_size, ..manifest.recipe.clone() };
    let mut plan = Plan::decoded(&source, recipe, inputs, config)?;
    if left_apart {
        plan.warnings.push(
            "experts that the source had fused, with rows and columns exchanged, stay one by one: its model takes them only \
             fused"
                .to_owned(),
        );
    }
    options.device = Device::cpu();
    options.hash_source = true; // what is read must be what its manifest says
    Conversion::dequantize(source, plan, manifest, options)
}

/// A converted checkpoint.
struct Converted<'a> {
    source: &'a Source,
    manifest: &'a Manifest,
    /// Tensors by name.
    places: HashMap<&'a str, (Span, &'a TensorInfo)>,
    /// Files of the source, opened as they are needed.
    files: Vec<Option<Box<dyn ReadAt>>>,
}

impl<'a> Converted<'a> {
    fn new(source: &'a Source, manifest: &'a Manifest) -> Converted<'a> {
        let mut places = HashMap::new();
        for (file, of_file) in source.files.iter().enumerate() {
            for (tensor, info) in of_file.tensors.iter().enumerate() {
                places.insert(&*info.name, (Span { file, tensor, offset: info.offset, len: info.len }, info));
            }
        }
        Converted { source, manifest, places, files: source.files.iter().map(|_| None).collect() }
    }

    /// Every tensor of the manifest, decoded; experts that were fused are so again. Also whether some can't be.
    fn inputs(mut self) -> Result<(Vec<Input>, bool)> {
        let (manifest, source) = (self.manifest, self.source);
        let model_types = source.config.as_ref().map(|config| config.model_types()).unwrap_or_default();
        self.check_all_recorded()?;
        let (mut inputs, mut left_apart) = (Vec::new(), false);
        // What one tensor of the source was taken apart into stands together.
        for records in manifest.tensors.chunk_by(|a, b| a.sources == b.sources) {
            let matrices = records.iter().map(|record| self.input(record)).collect::<Result<Vec<_>>>()?;
            let was_fused = records[0].sources.first().filter(|_| matrices.len() > 1);
            let joined = was_fused.map(|fused| split::join(source, &model_types, &fused.name, &fused.shape, &matrices));
            left_apart |= joined == Some(None);
            match joined.flatten() {
                Some(joined) => inputs.push(joined),
                None => inputs.extend(matrices),
            }
        }
        Ok((inputs, left_apart))
    }

    /// Whether the manifest tells of every tensor that is there.
    fn check_all_recorded(&self) -> Result<()> {
        let outputs = self.manifest.tensors.iter().flat_map(|record| &record.outputs);
        let recorded: HashSet<&str> = outputs.map(|output| output.name.as_str()).collect();
        match self.places.keys().find(|name| !recorded.contains(*name)) {
            Some(name) => Err(self.malformed(format!("it doesn't tell of {name:?}"))),
            None if recorded.is_empty() => Err(self.malformed("it tells of no tensor".to_owned())),
            None => Ok(()),
        }
    }

    fn input(&mut self, record: &TensorRecord) -> Result<Input> {
        let first = record.outputs.first().ok_or_else(|| self.malformed("a tensor without outputs".to_owned()))?;
        if record.decision == DecisionRecord::Keep {
            let (place, info) = self.tensor(&first.name)?;
            return Ok(as_stored(info, place));
        }
        let codec = self.manifest.recipe.codec();
        let suffix = codec.codes_suffix();
        let name = first.name.strip_suffix(suffix);
        let name = name.ok_or_else(|| self.malformed(format!("{:?} doesn't end in {suffix:?}", first.name)))?;
        let (decode, shape) = match codec.is_blocks() {
            true => self.blocks(&codec, name)?,
            false => self.groups(&codec, name, &first.name)?,
        };
        let read = Read::decode(decode);
        let read = read.map_err(|why| self.malformed(format!("{:?} of shape {shape:?}: {why}", first.name)))?;
        let input = decoded(name.to_owned(), shape, decode.dtype, read);
        // gpt-oss's model has rows and columns the other way round.
        let transposed = codec.layout() == Some(Layout::GptOss);
        Ok(if transposed { input.transposed() } else { input })
    }

    /// bitsandbytes' weights: their quant_state tells all.
    fn blocks(&mut self, codec: &Codec, name: &str) -> Result<(Decode, Vec<u64>)> {
        let state_name = format!("{name}{}", quant_state_suffix(codec));
        let json = self.bytes(&state_name, MAX_QUANT_STATE)?;
        let state =
            ParsedQuantState::parse(&json).map_err(|error| self.malformed(format!("{state_name:?}: {error}")))?;
        let dtype = FloatDtype::from_torch_name(&state.dtype);
        let dtype = dtype.ok_or_else(|| self.malformed(format!("{state_name:?}: unknown dtype {:?}", state.dtype)))?;
        let elements = state.shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension));
        let elements = elements.filter(|&elements| elements > 0);
        let columns =
            elements.ok_or_else(|| self.malformed(format!("{state_name:?}: a shape of {:?}", state.shape)))?;
        let (codes, _) = self.tensor(name)?;
        let (scales, _) = self.tensor(&format!("{name}.absmax"))?;
        let nested = match codec.double_quant() {
            true => {
                let (absmax, _) = self.tensor(&format!("{name}.nested_absmax"))?;
                Some(Nested { absmax, offset: state.nested_offset.unwrap_or(0.0) as f32 })
            }
            false => None,
        };
        let coding = codec.coding(columns, None);
        let row_len = columns.div_ceil(2);
        let (rows, group_rows, zero_points) = (1, 1, None);
        let decode = Decode { coding, dtype, rows, columns, row_len, group_rows, codes, scales, zero_points, nested };
        Ok((decode, state.shape))
    }

    fn groups(&mut self, codec: &Codec, name: &str, codes: &str) -> Result<(Decode, Vec<u64>)> {
        let (scales, scale) = self.tensor(&format!("{name}{}", codec.scales_suffix()))?;
        let (codes, packed) = self.tensor(codes)?;
        let shape = match (&packed.shape[..], codec.layout()) {
            (&[experts, rows, groups, 16], Some(Layout::GptOss)) if experts <= MAX_EXPERTS => {
                vec![experts, rows, groups.saturating_mul(32)]
            }
            (&[rows, columns], _) if !compressed_tensors::is_integer(codec) => vec![rows, columns.saturating_mul(2)],
            (&[_, _], _) => {
                let bytes = self.bytes(&format!("{name}_shape"), 16)?;
                bytes.as_chunks().0.iter().map(|dimension| u64::from_le_bytes(*dimension)).collect()
            }
            (shape, _) => return Err(self.malformed(format!("{:?} has the shape {shape:?}", packed.name))),
        };
        let columns = shape.last().copied().filter(|_| !shape.contains(&0));
        let columns = columns.ok_or_else(|| self.malformed(format!("{name:?}: a shape of {shape:?}")))?;
        let scales_dtype = float_dtype(scale.dtype);
        let dtype = codec.decoded_dtype(scales_dtype, model_dtype(self.source.config.as_ref()));
        let dtype = dtype.ok_or_else(|| self.malformed(format!("{:?} is {}", scale.name, scale.dtype)))?;
        let tensor_scale =
            codec.tensor_scale_suffix().map(|suffix| self.number(&format!("{name}{suffix}"))).transpose()?;
        let coding = codec.coding(columns, tensor_scale);
        let zero_points = match codec.has_zero_points() {
            true => Some(self.tensor(&format!("{name}_zero_point"))?.0),
            false => None,
        };
        let row_len = codec.packed_row(columns);
        let elements = shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension));
        let rows = elements.ok_or_else(|| self.malformed(format!("{name:?}: a shape of {shape:?}")))? / columns;
        let (group_rows, nested) = (1, None);
        let decode = Decode { coding, dtype, rows, columns, row_len, group_rows, codes, scales, zero_points, nested };
        Ok((decode, shape))
    }

    fn tensor(&self, name: &str) -> Result<(Span, &'a TensorInfo)> {
        self.places.get(name).copied().ok_or_else(|| self.malformed(format!("{name:?} is missing from the files")))
    }

    /// A tensor of one f32.
    fn number(&mut self, name: &str) -> Result<f32> {
        let bytes = self.bytes(name, 4)?;
        let number = <[u8; 4]>::try_from(&bytes[..]).map(f32::from_le_bytes);
        number.map_err(|_| self.malformed(format!("{name:?} has {} bytes, expected one f32", bytes.len())))
    }

    /// All bytes of a small tensor.
    fn bytes(&mut self, name: &str, most: u64) -> Result<Vec<u8>> {
        let (place, info) = self.tensor(name)?;
        if info.len > most {
            return Err(self.malformed(format!("{name:?} has {} bytes, expected {most} at most", info.len)));
        }
        let path = self.source.files[place.file].location.path();
        let file = match &mut self.files[place.file] {
            Some(file) => file,
            none => none.insert(self.source.files[place.file].reopen()?),
        };
        let mut bytes = vec![0; info.len as usize];
        read_exact_at(&**file, &mut bytes, place.offset).at(path, "read it")?;
        Ok(bytes)
    }

    fn malformed(&self, why: String) -> Error {
        let why = format!("{why}: the files aren't what the manifest says; `prequant verify` tells more");
        Error::malformed(self.source.location.join(MANIFEST_NAME).path(), why)
    }
}
