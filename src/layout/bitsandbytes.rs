//! What a bitsandbytes 4-bit weight is on disk: the tensors beside it, its quant_state, and config.json's part.
//!
//! Names, order and spelling are what transformers' `save_pretrained` writes.

use std::borrow::Cow;

use serde::Deserialize;
use serde_json::{Value, json};

use crate::dtype::{self, FloatDtype};
use crate::error::Result;
use crate::format::{BlockSize, Codec, NESTED_BLOCK_SIZE, Scales, dynamic_map};
use crate::layout::{OutputDtype, OutputKind, OutputTensor, Stored, StoredWeight};

/// Room for `nested_offset` in a quant_state: the longest f64 that is an f32, as Python prints it.
const OFFSET_WIDTH: usize = 24;

/// The end of the name of a weight's absmax.
pub(crate) const ABSMAX: &str = ".absmax";
/// What stands between a weight's name and its format's in the name of its quant_state.
pub(crate) const QUANT_STATE: &str = ".quant_state.bitsandbytes__";

/// config.json's key for the experts' implementation, and what it names to stop transformers at 4-bit ones: it knows no such one.
/// prequant's loader takes it for the default.
pub(crate) const EXPERTS_KEY: &str = "experts_implementation";
pub(crate) const EXPERTS_GUARD: &str = "prequant_loader";

/// The key of the modules left unquantized.
pub(crate) const KEPT_MODULES: &str = "llm_int8_skip_modules";
/// The key of the dtype that matrix products run in.
pub(crate) const COMPUTE_DTYPE: &str = "bnb_4bit_compute_dtype";

/// The longest quant_state that is read: real ones have a hundred or two hundred bytes.
pub(crate) const MAX_QUANT_STATE: u64 = 1 << 16;

/// The tensors that a weight of `shape` becomes, for a dtype and codec.
pub(crate) fn output_tensors(codec: &Codec, dtype: FloatDtype, shape: &[u64]) -> Vec<OutputTensor> {
    let elements: u64 = shape.iter().product();
    let blocks = elements.div_ceil(codec.block_len(elements));
    let tensor = |kind, suffix, is_f32, shape| {
        let dtype = if is_f32 { OutputDtype::Float(FloatDtype::Float32) } else { OutputDtype::U8 };
        OutputTensor { kind, suffix: Cow::Borrowed(suffix), dtype, shape }
    };
    let storage = codec.quant_storage();
    let packed = tensor(OutputKind::Packed, "", false, vec![elements.div_ceil(2) / storage.size(), 1]);
    let packed_dtype = storage.float().map_or(OutputDtype::U8, OutputDtype::Float);
    let mut tensors = vec![
        OutputTensor { dtype: packed_dtype, ..packed },
        tensor(OutputKind::Absmax, ABSMAX, !codec.double_quant(), vec![blocks]),
        tensor(OutputKind::QuantMap, ".quant_map", true, vec![16]),
    ];
    if codec.double_quant() {
        let nested = blocks.div_ceil(NESTED_BLOCK_SIZE as u64);
        tensors.push(tensor(OutputKind::NestedAbsmax, ".nested_absmax", true, vec![nested]));
        tensors.push(tensor(OutputKind::NestedQuantMap, ".nested_quant_map", true, vec![256]));
    }
    let length = quant_state_len(codec, dtype, shape) as u64;
    let state = tensor(OutputKind::QuantState, "", false, vec![length]);
    tensors.push(OutputTensor { suffix: format!("{QUANT_STATE}{}", codec.format.library_name).into(), ..state });
    tensors
}

/// What a weight's tensors say of it: the quant_state says all.
///
/// # Errors
/// When it can't be read, or says what can't be.
pub(crate) fn read(codec: &Codec, weight: &mut dyn StoredWeight) -> Result<Stored> {
    let json = weight.bytes(OutputKind::QuantState, MAX_QUANT_STATE)?;
    let state = ParsedQuantState::parse(&json);
    let state = state.map_err(|error| weight.malformed(format!("its quant_state: {error}")))?;
    let dtype = FloatDtype::from_torch_name(&state.dtype);
    let dtype = dtype.ok_or_else(|| weight.malformed(format!("its quant_state: unknown dtype {:?}", state.dtype)))?;
    let difference = state.differences(codec, dtype).into_iter().next();
    let shape = state.shape;
    let Some(columns @ 1..) = dtype::elements(&shape) else {
        return Err(weight.malformed(format!("its quant_state: a shape of {shape:?}")));
    };
    let nested_offset = match (codec.double_quant(), state.nested_offset) {
        (true, None) => return Err(weight.malformed("its quant_state has no nested_offset".to_owned())),
        (is_nested, offset) => offset.filter(|_| is_nested).map(|offset| offset as f32),
    };
    if let Some(what) = difference {
        return Err(weight.malformed(format!("its quant_state {what}")));
    }
    // Blocks run through the whole weight.
    let (rows, coding) = (1, codec.coding(columns, None));
    Ok(Stored { shape, dtype, coding, rows, columns, nested_offset, transposed: false })
}

/// The codec of a weight that no manifest is of: with the size of blocks that its quant_state says. What each code stands for must
/// be what it does in the format.
///
/// # Errors
/// When the quant_state can't be read, or a table is another.
pub(crate) fn codec_of(codec: &Codec, weight: &mut dyn StoredWeight) -> Result<Codec> {
    let Scales::Blocks { codebook, double_quant, storage, .. } = codec.scales else { return Ok(*codec) };
    let json = weight.bytes(OutputKind::QuantState, MAX_QUANT_STATE)?;
    let state = ParsedQuantState::parse(&json);
    let state = state.map_err(|error| weight.malformed(format!("its quant_state: {error}")))?;
    let size =
        u32::try_from(state.blocksize).map_err(|_| "expected 4096 at most".to_owned()).and_then(BlockSize::try_from);
    let size = size.map_err(|error| weight.malformed(format!("its quant_state: {error}")))?;
    if let Some(nested) = state.nested_blocksize.filter(|nested| *nested != NESTED_BLOCK_SIZE as u64) {
        return Err(
            weight.malformed(format!("its quant_state: nested_blocksize {nested}, expected {NESTED_BLOCK_SIZE}"))
        );
    }
    if !has_table(weight, OutputKind::QuantMap, &codebook.values())? {
        let name = weight.info(OutputKind::QuantMap)?.name.to_string();
        let why = "has other values than bitsandbytes gives codes of this format, which aren't decoded";
        return Err(weight.malformed(format!("{name:?} {why}")));
    }
    Ok(Codec { scales: Scales::Blocks { codebook, size, double_quant, storage }, ..*codec })
}

/// Whether the 8-bit codes of absmax stand for something else than in bitsandbytes 0.50.2: 0.49's CPU had another lowest value.
///
/// # Errors
/// When the table can't be read.
pub(crate) fn has_other_nested_values(codec: &Codec, weight: &mut dyn StoredWeight) -> Result<bool> {
    Ok(codec.double_quant() && !has_table(weight, OutputKind::NestedQuantMap, dynamic_map().values())?)
}

/// Whether a table of what codes stand for is this one; one that isn't there is.
fn has_table(weight: &mut dyn StoredWeight, kind: OutputKind, expected: &[f32]) -> Result<bool> {
    if weight.info(kind).is_err() {
        return Ok(true);
    }
    let bytes = weight.bytes(kind, size_of_val(expected) as u64)?;
    let found = bytes.as_chunks().0.iter().map(|value| f32::from_le_bytes(*value));
    Ok(found.eq(expected.iter().copied()))
}

/// What a quant_state says, besides the tensors.
#[derive(Clone, Copy, Debug)]
pub struct QuantState<'a> {
    /// How the weight was quantized.
    pub codec: &'a Codec,
    /// The source's dtype, which decoding returns to.
    pub dtype: FloatDtype,
    /// The source's shape.
    pub shape: &'a [u64],
    /// The mean that was taken off absmax; for double quantization only.
    pub nested_offset: f32,
}

/// The bytes of `X.quant_state.bitsandbytes__*`: JSON as Python's `json.dumps` spells it.
///
/// With double quantization the number of digits of `nested_offset` is known only once the weight has been read, so the
/// object is padded with spaces to a length known before: every offset in the file is then known before as well.
pub fn quant_state_bytes(state: &QuantState<'_>) -> Vec<u8> {
    let mut json = quant_state_json(state, &python_float(state.nested_offset));
    if state.codec.double_quant() {
        let width = quant_state_len(state.codec, state.dtype, state.shape);
        json.extend(std::iter::repeat_n(' ', width.saturating_sub(json.len())));
    }
    json.into_bytes()
}

/// A quant_state as it is read back. Other keys are ignored.
#[derive(Debug, PartialEq, Deserialize)]
pub struct ParsedQuantState {
    /// The 4-bit format's name.
    pub quant_type: String,
    /// Elements that share one absmax.
    pub blocksize: u64,
    /// The source's dtype, as torch calls it.
    pub dtype: String,
    /// The source's shape.
    pub shape: Vec<u64>,
    /// The mean that was taken off absmax, with double quantization.
    pub nested_offset: Option<f64>,
    /// Entries of absmax that share one nested absmax, with double quantization.
    pub nested_blocksize: Option<u64>,
}

impl ParsedQuantState {
    /// Reads the tensor's bytes.
    ///
    /// # Errors
    /// When they are no such JSON object.
    pub fn parse(bytes: &[u8]) -> serde_json::Result<ParsedQuantState> {
        serde_json::from_slice(bytes)
    }

    /// What it says otherwise than the quant_state of a weight in `dtype`, quantized with `codec`. Its shape is the caller's to
    /// compare.
    pub(crate) fn differences(&self, codec: &Codec, dtype: FloatDtype) -> Vec<String> {
        let Scales::Blocks { size, double_quant, .. } = codec.scales else {
            return vec![format!("is bitsandbytes', and the recipe is of {}", codec.format.name)];
        };
        let found = (self.quant_type.as_str(), self.blocksize, self.dtype.as_str());
        let expected = (codec.format.library_name, u64::from(u32::from(size)), dtype.torch_name());
        let mut differences = Vec::new();
        if found != expected {
            differences.push(format!("says {found:?}, expected {expected:?}"));
        }
        if self.nested_offset.is_some() != double_quant {
            differences.push("and the recipe don't agree on double quantization".to_owned());
        }
        differences
    }
}

/// The length of [`quant_state_bytes`], whatever `nested_offset` turns out to be.
pub(crate) fn quant_state_len(codec: &Codec, dtype: FloatDtype, shape: &[u64]) -> usize {
    let widest = "0".repeat(OFFSET_WIDTH);
    quant_state_json(&QuantState { codec, dtype, shape, nested_offset: 0.0 }, &widest).len()
}

fn quant_state_json(state: &QuantState<'_>, nested_offset: &str) -> String {
    let shape: Vec<String> = state.shape.iter().map(u64::to_string).collect();
    let mut json = format!(
        r#"{{"quant_type": "{}", "blocksize": {}, "dtype": "{}", "shape": [{}]"#,
        state.codec.format.library_name,
        state.codec.block_len(0),
        state.dtype.torch_name(),
        shape.join(", "),
    );
    if state.codec.double_quant() {
        json += &format!(
            r#", "nested_blocksize": {NESTED_BLOCK_SIZE}, "nested_dtype": "float32", "nested_offset": {nested_offset}"#
        );
    }
    json + "}"
}

/// An f32 as Python's `repr(float)` prints it: the shortest digits that give the f64 back, with an exponent below 1e-4
/// and from 1e16 on.
fn python_float(x: f32) -> String {
    let x = f64::from(x);
    if x == 0.0 || (1e-4..1e16).contains(&x.abs()) {
        return format!("{x:?}");
    }
    let text = format!("{x:e}");
    match text.split_once('e') {
        Some((digits, exponent)) => {
            let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |e| ('-', e));
            format!("{digits}e{sign}{exponent:0>2}")
        }
        None => text,
    }
}

/// config.json's `quantization_config`: what tells a client how to load the weights.
///
/// `compute_dtype` is the dtype that matrix products run in; `skip_modules` are the Linear modules left unquantized,
/// which must be all of them: a given list replaces the client's own defaults.
pub(crate) fn quantization_config(codec: &Codec, compute_dtype: FloatDtype, skip_modules: &[String]) -> Value {
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": true,
        "load_in_8bit": false,
        "bnb_4bit_quant_type": codec.format.library_name,
        "bnb_4bit_use_double_quant": codec.double_quant(),
        (COMPUTE_DTYPE): compute_dtype.torch_name(),
        "bnb_4bit_quant_storage": codec.quant_storage().name(),
        (KEPT_MODULES): skip_modules,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{CodecOptions, INT4, NF4};

    fn codec(double_quant: bool) -> Codec {
        NF4.codec(CodecOptions { double_quant, ..CodecOptions::default() })
    }

    #[test]
    fn quant_state_is_spelled_as_python_spells_it() {
        let state =
            QuantState { codec: &codec(false), dtype: FloatDtype::Bfloat16, shape: &[128, 256], nested_offset: 0.0 };
        assert_eq!(
            String::from_utf8(quant_state_bytes(&state)).unwrap(),
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [128, 256]}"#
        );
        let nested = QuantState { codec: &codec(true), nested_offset: f32::from_bits(0x3e207a06), ..state };
        let json = String::from_utf8(quant_state_bytes(&nested)).unwrap();
        assert!(
            json.contains(r#", "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.156"#),
            "{json}"
        );
        let parsed = ParsedQuantState::parse(json.as_bytes()).unwrap();
        assert_eq!((parsed.blocksize, parsed.shape), (64, vec![128, 256]));
        assert_eq!(parsed.nested_offset, Some(f64::from(f32::from_bits(0x3e207a06))));
    }

    #[test]
    fn quant_state_length_does_not_depend_on_the_offset() {
        let codec = codec(true);
        let expected = quant_state_len(&codec, FloatDtype::Float32, &[3]);
        for bits in [0, 1, 0x007fffff, 0x3f800000, 0x3e207a06, 0x7f7fffff, 0x00800001, 0x38d1b717, 0x5a0e1bca] {
            let nested_offset = f32::from_bits(bits);
            let state = QuantState { codec: &codec, dtype: FloatDtype::Float32, shape: &[3], nested_offset };
            assert_eq!(quant_state_bytes(&state).len(), expected, "{nested_offset:e}");
        }
    }

    #[test]
    fn a_quant_state_is_compared_with_the_codec_in_every_word() {
        let state = |double_quant| {
            let codec = &codec(double_quant);
            let (dtype, shape) = (FloatDtype::Bfloat16, &[3][..]);
            ParsedQuantState::parse(&quant_state_bytes(&QuantState { codec, dtype, shape, nested_offset: 0.5 }))
                .unwrap()
        };
        let differs = |state: ParsedQuantState, words: &[&str]| {
            let found = state.differences(&codec(true), FloatDtype::Bfloat16);
            assert!(found.len() == words.len() && found.iter().zip(words).all(|(f, w)| f.contains(w)), "{found:?}");
        };
        differs(state(true), &[]);
        differs(state(false), &["don't agree on double quantization"]);
        differs(ParsedQuantState { nested_offset: None, ..state(true) }, &["double quantization"]);
        differs(ParsedQuantState { blocksize: 128, ..state(true) }, &["says (\"nf4\", 128, \"bfloat16\"), expected"]);
        differs(ParsedQuantState { dtype: "float16".to_owned(), ..state(false) }, &["\"float16\"", "double"]);
        let of_groups = state(true).differences(&INT4.codec(CodecOptions::default()), FloatDtype::Bfloat16);
        assert_eq!(of_groups, ["is bitsandbytes', and the recipe is of int4"]);
    }

    #[test]
    fn floats_are_printed_as_python_prints_them() {
        let printed = [0.0, 1.0, 0.156_713_49, 1e-5, 1.5e-7, 1e16, 1e-45, 3.4028235e38].map(python_float);
        let expected = [
            "0.0",
            "1.0",
            "0.15671348571777344",
            "9.999999747378752e-06",
            "1.500000053056283e-07",
            "1.0000000272564224e+16",
        ];
        assert_eq!(printed[..6], expected);
        assert_eq!(printed[6..], ["1.401298464324817e-45", "3.4028234663852886e+38"]);
    }
}
