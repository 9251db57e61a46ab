//! Dtypes: those of the safetensors format, by its own library, and those that weights are quantized from.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use safetensors::Dtype;

/// The dtype that headers call `name`.
pub(crate) fn named(name: &str) -> Option<Dtype> {
    Dtype::deserialize(serde::de::value::StrDeserializer::<serde::de::value::Error>::new(name)).ok()
}

/// Elements of a tensor of this shape; `None` past u64.
pub(crate) fn elements(shape: &[u64]) -> Option<u64> {
    shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension))
}

/// Bytes of a tensor of this dtype and `shape`; `None` past u64, or if it is not whole bytes.
pub(crate) fn byte_len(dtype: Dtype, shape: &[u64]) -> Option<u64> {
    let bits = elements(shape)?.checked_mul(dtype.bitsize() as u64)?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The floating-point dtypes that weights are quantized from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FloatDtype {
    /// bfloat16: the upper half of an f32.
    Bfloat16,
    /// IEEE half precision.
    Float16,
    /// IEEE single precision.
    Float32,
}

impl FloatDtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            FloatDtype::Bfloat16 | FloatDtype::Float16 => 2,
            FloatDtype::Float32 => 4,
        }
    }

    /// The same as one of these, if it is.
    pub fn of(dtype: Dtype) -> Option<FloatDtype> {
        [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32].into_iter().find(|d| d.dtype() == dtype)
    }

    /// The format's.
    pub fn dtype(self) -> Dtype {
        match self {
            FloatDtype::Bfloat16 => Dtype::BF16,
            FloatDtype::Float16 => Dtype::F16,
            FloatDtype::Float32 => Dtype::F32,
        }
    }

    /// The dtype that torch calls `name`.
    pub fn from_torch_name(name: &str) -> Option<FloatDtype> {
        [FloatDtype::Bfloat16, FloatDtype::Float16, FloatDtype::Float32].into_iter().find(|d| d.torch_name() == name)
    }

    /// torch's name, as quant_state and config.json spell it.
    pub fn torch_name(self) -> &'static str {
        match self {
            FloatDtype::Bfloat16 => "bfloat16",
            FloatDtype::Float16 => "float16",
            FloatDtype::Float32 => "float32",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dtypes_are_found_by_the_names_that_headers_have() {
        for name in ["BOOL", "F4", "F6_E2M3", "U8", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "BF16", "F32", "C64", "U64"] {
            assert_eq!(named(name).map(|dtype| dtype.to_string()).as_deref(), Some(name));
        }
        assert_eq!((named("Q4"), named("bf16"), named("")), (None, None, None));
    }

    #[test]
    fn sizes_are_whole_bytes_below_2_to_the_64() {
        assert_eq!(byte_len(Dtype::BF16, &[]), Some(2));
        assert_eq!(byte_len(Dtype::F32, &[3, 0, 5]), Some(0));
        assert_eq!((byte_len(Dtype::F4, &[4]), byte_len(Dtype::F4, &[3])), (Some(2), None));
        assert_eq!(byte_len(Dtype::U8, &[1 << 40, 1 << 40]), None);
        assert_eq!((elements(&[]), elements(&[3, 5]), elements(&[1 << 40, 1 << 24])), (Some(1), Some(15), None));
    }
}
