//! The dtypes of the safetensors format.

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! dtypes {
    ($($variant:ident = $name:literal, $bits:literal;)*) => {
        /// A tensor's dtype. The order is the one in which safetensors lays tensors out, last first.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[allow(missing_docs, reason = "each is the format's own name")]
        pub enum Dtype { $($variant),* }

        impl Dtype {
            /// Every dtype.
            pub const ALL: &[Dtype] = &[$(Dtype::$variant),*];

            /// The name in headers.
            pub fn name(self) -> &'static str {
                match self { $(Dtype::$variant => $name),* }
            }

            /// Bits of one element.
            pub fn bits(self) -> u64 {
                match self { $(Dtype::$variant => $bits),* }
            }

            /// The dtype called `name`.
            pub fn from_name(name: &str) -> Option<Dtype> {
                match name { $($name => Some(Dtype::$variant),)* _ => None }
            }
        }
    };
}

dtypes! {
    Bool = "BOOL", 8;
    F4 = "F4", 4;
    F6E2M3 = "F6_E2M3", 6;
    F6E3M2 = "F6_E3M2", 6;
    U8 = "U8", 8;
    I8 = "I8", 8;
    F8E5M2 = "F8_E5M2", 8;
    F8E4M3 = "F8_E4M3", 8;
    F8E8M0 = "F8_E8M0", 8;
    F8E4M3Fnuz = "F8_E4M3FNUZ", 8;
    F8E5M2Fnuz = "F8_E5M2FNUZ", 8;
    I16 = "I16", 16;
    U16 = "U16", 16;
    F16 = "F16", 16;
    Bf16 = "BF16", 16;
    I32 = "I32", 32;
    U32 = "U32", 32;
    F32 = "F32", 32;
    C64 = "C64", 64;
    F64 = "F64", 64;
    I64 = "I64", 64;
    U64 = "U64", 64;
}

impl Dtype {
    /// Bytes of a tensor of this dtype and `shape`; `None` past u64, or if it is not whole bytes.
    pub fn byte_len(self, shape: &[u64]) -> Option<u64> {
        let elements = shape.iter().try_fold(1u64, |product, &dimension| product.checked_mul(dimension))?;
        let bits = elements.checked_mul(self.bits())?;
        bits.is_multiple_of(8).then_some(bits / 8)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
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
    fn names_sizes_and_order_are_the_safetensors_librarys() {
        let theirs = Dtype::ALL.iter().map(|dtype| {
            let name = format!("\"{dtype}\"");
            serde_json::from_str::<safetensors::Dtype>(&name).unwrap_or_else(|error| panic!("{name}: {error}"))
        });
        let theirs: Vec<_> = theirs.collect();
        assert!(theirs.is_sorted());
        for (ours, theirs) in Dtype::ALL.iter().zip(theirs) {
            assert_eq!(ours.bits(), theirs.bitsize() as u64, "{ours}");
            assert_eq!(Dtype::from_name(ours.name()), Some(*ours));
        }
    }

    #[test]
    fn sizes_are_whole_bytes_below_2_to_the_64() {
        assert_eq!(Dtype::Bf16.byte_len(&[]), Some(2));
        assert_eq!(Dtype::F32.byte_len(&[3, 0, 5]), Some(0));
        assert_eq!((Dtype::F4.byte_len(&[4]), Dtype::F4.byte_len(&[3])), (Some(2), None));
        assert_eq!(Dtype::U8.byte_len(&[1 << 40, 1 << 40]), None);
    }
}
