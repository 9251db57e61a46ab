//! Output tensors, files and offsets.

use std::borrow::Cow;
use std::cmp::Reverse;
use std::ops::Range;

use super::{Decision, PlannedTensor};
use crate::checkpoint::{ALIGNMENT, Described, header_bytes, shard_name};
use crate::dtype::{Dtype, byte_len};
use crate::format::Codec;
use crate::layout::OutputKind;

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PlannedOutput {
    /// Which part of a quantized weight it is; `None` for a tensor kept as it is.
    pub kind: Option<OutputKind>,
    /// Its name, after the source tensor's.
    pub suffix: Cow<'static, str>,
    /// Its dtype.
    pub dtype: Dtype,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its size in bytes.
    pub len: u64,
    /// Its first byte's offset in the output file.
    pub offset: u64,
}

impl PlannedOutput {
    /// Whether it stands behind a file's other outputs, since it would leave the next one unaligned.
    pub(crate) fn is_at_the_end(&self) -> bool {
        !self.len.is_multiple_of(ALIGNMENT)
    }
}

/// A file to be written.
#[derive(Clone, Debug)]
pub struct PlannedFile {
    /// Its name.
    pub name: String,
    /// Which of the plan's tensors it holds.
    pub tensors: Range<usize>,
    /// Bytes before its tensors.
    pub(crate) header_len: u64,
    /// Its size in bytes.
    pub len: u64,
}

/// What a tensor becomes; offsets are set by [`lay_out`].
pub(crate) fn outputs(tensor: &PlannedTensor, codec: &Codec) -> Vec<PlannedOutput> {
    let Decision::Quantize(dtype) = tensor.decision else {
        let (dtype, shape, len) = (tensor.dtype, tensor.shape.clone(), tensor.source_len());
        return vec![PlannedOutput { kind: None, suffix: Cow::Borrowed(""), dtype, shape, len, offset: 0 }];
    };
    let outputs = codec.output_tensors(dtype, &tensor.shape).into_iter();
    outputs
        .map(|output| {
            let dtype = output.dtype.dtype(tensor.dtype);
            let len = byte_len(dtype, &output.shape).expect("at most the source's bytes, or a few");
            PlannedOutput { kind: Some(output.kind), suffix: output.suffix, dtype, shape: output.shape, len, offset: 0 }
        })
        .collect()
}

/// Divides tensors among files, in their order, and gives every output its offset.
///
/// A file is closed before the tensor that would take it past `max_shard_size`.
pub(crate) fn lay_out(tensors: &mut [PlannedTensor], max_shard_size: u64) -> Vec<PlannedFile> {
    let ranges = shard_ranges(tensors, max_shard_size);
    let count = ranges.len();
    let files = ranges.into_iter().enumerate();
    files
        .map(|(i, range)| {
            let (header_len, len) = place(&mut tensors[range.clone()]);
            PlannedFile { name: shard_name(i, count), tensors: range, header_len, len }
        })
        .collect()
}

fn shard_ranges(tensors: &[PlannedTensor], max_shard_size: u64) -> Vec<Range<usize>> {
    let mut ranges = Vec::new();
    let (mut start, mut size) = (0, 0u64);
    for (i, tensor) in tensors.iter().enumerate() {
        let len = tensor.output_len();
        if i > start && size.saturating_add(len) > max_shard_size {
            ranges.push(start..i);
            (start, size) = (i, 0);
        }
        size = size.saturating_add(len);
    }
    ranges.push(start..tensors.len());
    ranges
}

/// An output on its way to its place in a file.
struct Placed<'a> {
    name: String,
    /// Which output of which tensor it is.
    index: (usize, usize),
    output: &'a PlannedOutput,
}

impl Described for Placed<'_> {
    fn name(&self) -> &str {
        &self.name
    }

    fn dtype(&self) -> Dtype {
        self.output.dtype
    }

    fn shape(&self) -> &[u64] {
        &self.output.shape
    }
}

/// Sets the offsets of one file's outputs; returns the length of its header and its size.
fn place(tensors: &mut [PlannedTensor]) -> (u64, u64) {
    let placed = in_order(tensors);
    let header_len = header_bytes(&placed).len() as u64;
    let order: Vec<(usize, usize)> = placed.iter().map(|placed| placed.index).collect();
    let mut position = header_len;
    for (tensor, output) in order {
        let output = &mut tensors[tensor].outputs[output];
        output.offset = position;
        position += output.len;
    }
    (header_len, position)
}

/// A file's outputs in the order of their bytes.
///
/// Tensors are written as they are made: each with all that belongs to it, in the plan's order, so that a file can be hashed
/// while it grows. Outputs that would leave the next one unaligned stand behind all others, the widest dtypes first.
fn in_order(tensors: &[PlannedTensor]) -> Vec<Placed<'_>> {
    let mut placed = Vec::new();
    for (i, tensor) in tensors.iter().enumerate() {
        placed.extend(tensor.outputs.iter().enumerate().map(|(j, output)| Placed {
            name: format!("{}{}", tensor.name, output.suffix),
            index: (i, j),
            output,
        }));
    }
    // A stable sort: what has the same key keeps its order.
    placed.sort_by_key(|placed| match placed.output.is_at_the_end() {
        false => (false, Reverse(0)),
        true => (true, Reverse(placed.output.dtype.bitsize())),
    });
    placed
}

impl PlannedFile {
    /// Its first bytes, of the tensors that it holds. Made when it is written: all files' take as much memory as the plan.
    pub(crate) fn header(&self, tensors: &[PlannedTensor]) -> Vec<u8> {
        header_bytes(&in_order(tensors))
    }
}
