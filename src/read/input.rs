//! A tensor, and where its bytes come from.

use std::sync::Arc;

use super::{Read, Span};
use crate::checkpoint::TensorInfo;
use crate::dtype::{Dtype, FloatDtype, byte_len};

/// More experts than any model has: each becomes a part of its own, or several.
pub(crate) const MAX_EXPERTS: u64 = 1 << 16;

/// A tensor to be converted.
#[derive(Clone, Debug, PartialEq)]
pub struct Input {
    /// Its name.
    pub name: Arc<str>,
    /// Its dtype, decoded.
    pub dtype: Dtype,
    /// Its shape, decoded.
    pub shape: Arc<[u64]>,
    /// Where its bytes come from.
    pub read: Read,
}

impl Input {
    /// A tensor as it is stored.
    pub fn as_stored(info: &TensorInfo, place: Span) -> Input {
        Input { name: info.name.clone(), dtype: info.dtype, shape: info.shape.clone(), read: Read::Bytes(place) }
    }

    /// A tensor that is decoded to `dtype`.
    pub fn decoded(name: impl Into<Arc<str>>, shape: impl Into<Arc<[u64]>>, dtype: FloatDtype, read: Read) -> Input {
        let (name, shape, dtype) = (name.into(), shape.into(), dtype.dtype());
        assert_eq!(byte_len(dtype, &shape), Some(read.len()), "{name}: decodes to its shape");
        Input { name, dtype, shape, read }
    }

    /// With all experts' matrices transposed.
    pub fn transposed(self) -> Input {
        let &[experts, rows, columns] = &self.shape[..] else { return self };
        let size = self.element_size();
        let matrices = (0..experts).map(|expert| self.read.slice(expert, experts).transposed([rows, columns], size));
        Input { shape: [experts, columns, rows].into(), read: Read::concat(matrices), ..self }
    }

    /// Bytes of an element.
    pub fn element_size(&self) -> usize {
        self.dtype.bitsize() / 8
    }
}
