//! What is written for a tensor. Tensors of one shape and dtype are written alike, but for the place: a checkpoint has many tensors
//! and few shapes, and every byte kept for each of them counts.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use super::{Decision, PlannedTensor};
use crate::checkpoint::ALIGNMENT;
use crate::dtype::{Dtype, FloatDtype, byte_len};
use crate::format::Codec;
use crate::layout::OutputKind;

/// A tensor to be written, wherever that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedOutput {
    /// Which part of a quantized weight it is; `None` for a tensor kept as it is.
    pub kind: Option<OutputKind>,
    /// Its name, after the source tensor's.
    pub suffix: Cow<'static, str>,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Arc<[u64]>,
    /// Its size in bytes.
    pub len: u64,
}

impl PlannedOutput {
    /// Whether it stands behind a file's other outputs, since it would leave the next one unaligned.
    pub(crate) fn is_at_the_end(&self) -> bool {
        !self.len.is_multiple_of(ALIGNMENT)
    }
}

/// A tensor's outputs, each with its place.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outputs {
    /// Of all tensors that are written alike.
    alike: Arc<[PlannedOutput]>,
    /// The offset of each one's first byte in the output file.
    offsets: Box<[u64]>,
}

/// One of a tensor's outputs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PlacedOutput<'a> {
    output: &'a PlannedOutput,
    /// Its first byte's offset in the output file.
    pub offset: u64,
}

impl Deref for PlacedOutput<'_> {
    type Target = PlannedOutput;

    fn deref(&self) -> &PlannedOutput {
        self.output
    }
}

impl Outputs {
    /// These, of which no place is known.
    pub(crate) fn new(alike: Arc<[PlannedOutput]>) -> Outputs {
        let offsets = vec![0; alike.len()].into();
        Outputs { alike, offsets }
    }

    /// How many.
    pub(crate) fn len(&self) -> usize {
        self.alike.len()
    }

    /// What they are, wherever they are.
    pub(crate) fn alike(&self) -> &[PlannedOutput] {
        &self.alike
    }

    /// The output with this number.
    pub(crate) fn get(&self, number: usize) -> PlacedOutput<'_> {
        PlacedOutput { output: &self.alike[number], offset: self.offsets[number] }
    }

    /// All, in the codec's order.
    pub(crate) fn iter(&self) -> impl ExactSizeIterator<Item = PlacedOutput<'_>> + Clone {
        self.alike.iter().zip(&self.offsets).map(|(output, &offset)| PlacedOutput { output, offset })
    }

    /// Puts the output with this number at an offset.
    pub(crate) fn place(&mut self, number: usize, offset: u64) {
        self.offsets[number] = offset;
    }
}

/// What tensors are alike by: whether they are quantized, their dtype and their shape.
type Kind = (bool, Dtype, Arc<[u64]>);

/// What tensors become, found once for all that are alike.
pub(crate) struct Alike<'c> {
    codec: &'c Codec,
    known: BTreeMap<Kind, Arc<[PlannedOutput]>>,
}

impl<'c> Alike<'c> {
    /// Of tensors that are quantized with `codec`, or kept.
    pub(crate) fn new(codec: &'c Codec) -> Alike<'c> {
        Alike { codec, known: BTreeMap::new() }
    }

    /// What a tensor becomes; places are found later.
    pub(crate) fn outputs(&mut self, tensor: &PlannedTensor) -> Outputs {
        let codec = self.codec;
        let key = (tensor.decision != Decision::Keep, tensor.dtype, tensor.shape.clone());
        let alike = self.known.entry(key).or_insert_with(|| match tensor.decision {
            Decision::Keep => [kept(tensor)].into(),
            Decision::Quantize(dtype) => quantized(tensor, dtype, codec),
            Decision::Carry(_) => match FloatDtype::of(tensor.dtype) {
                Some(dtype) => quantized(tensor, dtype, codec),
                None => unreachable!("what decodes is a float"),
            },
        });
        Outputs::new(alike.clone())
    }
}

fn kept(tensor: &PlannedTensor) -> PlannedOutput {
    let (dtype, shape, len) = (tensor.dtype, tensor.shape.clone(), tensor.source_len());
    PlannedOutput { kind: None, suffix: Cow::Borrowed(""), dtype, shape, len }
}

fn quantized(tensor: &PlannedTensor, dtype: FloatDtype, codec: &Codec) -> Arc<[PlannedOutput]> {
    let outputs = codec.output_tensors(dtype, &tensor.shape).into_iter();
    outputs
        .map(|output| {
            let dtype = output.dtype.dtype(tensor.dtype);
            let len = byte_len(dtype, &output.shape).expect("at most the source's bytes, or a few");
            PlannedOutput { kind: Some(output.kind), suffix: output.suffix, dtype, shape: output.shape.into(), len }
        })
        .collect()
}
