//! Output files, what stands in their headers, and offsets.

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::Arc;

use super::PlannedTensor;
use super::outputs::PlacedOutput;
use crate::checkpoint::{HeaderLen, HeaderText, MAX_HEADER_LEN, Metadata, Source};
use crate::error::Result;

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
    /// What its header says beside its tensors.
    pub(crate) metadata: Arc<Metadata>,
}

/// An output of a tensor of a file, by their numbers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// The tensor among the file's.
    pub tensor: u32,
    /// The output among the tensor's.
    pub output: u32,
}

impl Part {
    /// All of a file's that is laid out, in the order of their bytes.
    pub(crate) fn all(tensors: &[PlannedTensor]) -> Vec<Part> {
        let mut parts: Vec<Part> = Part::each(tensors).collect();
        // Those without bytes come before what is at the same place.
        parts.sort_by_key(|part| {
            let output = part.of(tensors);
            (output.offset, output.len)
        });
        parts
    }

    /// What the plan has for it.
    pub(crate) fn of(self, tensors: &[PlannedTensor]) -> PlacedOutput<'_> {
        tensors[self.tensor as usize].outputs.get(self.output as usize)
    }

    /// All of a file's, in the order in which their bytes are to be laid out.
    ///
    /// Tensors are written as they are made: each with all that belongs to it, in the plan's order, so that a file can be hashed
    /// while it grows. Outputs that would leave the next one unaligned stand behind all others, the widest dtypes first.
    fn in_order(tensors: &[PlannedTensor]) -> Vec<Part> {
        let mut parts: Vec<Part> = Part::each(tensors).collect();
        // A stable sort: what has the same key keeps its order.
        parts.sort_by_key(|part| {
            let output = part.of(tensors);
            match output.is_at_the_end() {
                false => (false, Reverse(0)),
                true => (true, Reverse(output.dtype.bitsize())),
            }
        });
        parts
    }

    fn each(tensors: &[PlannedTensor]) -> impl Iterator<Item = Part> {
        tensors.iter().enumerate().flat_map(|(tensor, planned)| {
            let outputs = 0..planned.outputs.len() as u32;
            outputs.map(move |output| Part { tensor: tensor as u32, output })
        })
    }
}

/// Divides tensors among files, in their order, and gives every output its offset.
///
/// A file is closed before the tensor that would take it past `max_shard_size`, or its header past what a header may have. Files
/// are called as those of `source` are, and have what its headers say beside their tensors.
pub(crate) fn lay_out(tensors: &mut [PlannedTensor], max_shard_size: u64, source: &Source) -> Vec<PlannedFile> {
    let metadata = &source.metadata;
    let of_metadata = HeaderText::len_of_metadata(metadata);
    let ranges = shard_ranges(tensors, max_shard_size, MAX_HEADER_LEN.saturating_sub(of_metadata));
    let count = ranges.len();
    let files = ranges.into_iter().enumerate();
    files
        .map(|(i, range)| {
            let (header_len, len) = place(&mut tensors[range.clone()], metadata);
            let (name, metadata) = (source.naming().file(i, count), metadata.clone());
            PlannedFile { name, tensors: range, header_len, len, metadata }
        })
        .collect()
}

fn shard_ranges(tensors: &[PlannedTensor], max_shard_size: u64, max_header_len: u64) -> Vec<Range<usize>> {
    let all = tensors.iter().map(PlannedTensor::output_len).fold(0, u64::saturating_add);
    let most_in_header = |tensor: &PlannedTensor| -> u64 {
        let outputs = tensor.outputs.alike().iter();
        let names = outputs.map(|output| [&*tensor.name, &*output.suffix]);
        names.zip(tensor.outputs.alike()).map(|(name, output)| HeaderText::most(name, &output.shape, all)).sum()
    };
    let mut ranges = Vec::new();
    let (mut start, mut size, mut header_len) = (0, 0u64, HeaderText::LEAST);
    for (i, tensor) in tensors.iter().enumerate() {
        let (len, in_header) = (tensor.output_len(), most_in_header(tensor));
        if i > start && (size.saturating_add(len) > max_shard_size || header_len + in_header > max_header_len) {
            ranges.push(start..i);
            (start, size, header_len) = (i, 0, HeaderText::LEAST);
        }
        size = size.saturating_add(len);
        header_len += in_header;
    }
    ranges.push(start..tensors.len());
    ranges
}

/// Sets the offsets of one file's outputs; returns the length of its header and its size.
fn place(tensors: &mut [PlannedTensor], metadata: &Metadata) -> (u64, u64) {
    let parts = Part::in_order(tensors);
    let mut header = HeaderLen::new(metadata);
    for part in &parts {
        let output = part.of(tensors);
        let name = [&*tensors[part.tensor as usize].name, &*output.suffix];
        header.entry(name, output.dtype, &output.shape, output.len);
    }
    let header_len = header.end();
    let mut position = header_len;
    for Part { tensor, output } in parts {
        let outputs = &mut tensors[tensor as usize].outputs;
        outputs.place(output as usize, position);
        position += outputs.get(output as usize).len;
    }
    (header_len, position)
}

impl PlannedFile {
    /// Hands its first bytes to `take`, piece by piece: what they say of `parts`, which are all of the file's in the order of their
    /// bytes. Made when the file is written: all files' headers would take as much memory as the plan.
    ///
    /// # Errors
    /// Those of `take`.
    pub(crate) fn write_header(
        &self,
        tensors: &[PlannedTensor],
        parts: &[Part],
        take: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        take(&(self.header_len - HeaderText::LENGTH_FIELD).to_le_bytes())?;
        write_entries(tensors, parts, &self.metadata, take)
    }
}

/// The header's JSON, piece by piece.
fn write_entries(
    tensors: &[PlannedTensor],
    parts: &[Part],
    metadata: &Metadata,
    take: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<()> {
    let mut text = HeaderText::new(metadata);
    let mut name = String::new();
    for part in parts {
        let output = part.of(tensors);
        name.clear();
        name += &tensors[part.tensor as usize].name;
        name += &output.suffix;
        text.entry(&name, output.dtype, &output.shape, output.len, take)?;
    }
    text.end(take)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::outputs::Alike;
    use super::*;
    use crate::dtype::FloatDtype;
    use crate::models::{Role, Verdict};
    use crate::plan::Decision;
    use crate::read::{Input, Read};
    use crate::recipe::Recipe;

    /// Matrices that are quantized, and kept vectors between them whose names must be escaped.
    fn tensors(count: u64) -> Vec<PlannedTensor> {
        let codec = Recipe::default().codec();
        let mut alike = Alike::new(&codec);
        let tensor = |i: u64| {
            let is_matrix = !i.is_multiple_of(3);
            let decision = if is_matrix { Decision::Quantize(FloatDtype::Bfloat16) } else { Decision::Keep };
            let (name, shape) =
                (format!("layers.{i}.\"größe\"\n.weight"), if is_matrix { vec![64, 64] } else { vec![3 * i] });
            let bytes: Arc<[u8]> = vec![0; 2 * shape.iter().product::<u64>() as usize].into();
            let input = Input::decoded(name, shape, FloatDtype::Bfloat16, Read::Literal(bytes));
            let verdict = Verdict {
                role: Role::Linear,
                quantize: true,
                linear: true,
                included: false,
                in_doubt: false,
                reason: "".into(),
            };
            PlannedTensor::new((input, verdict, decision), &mut alike)
        };
        (0..count).map(tensor).collect()
    }

    #[test]
    fn a_file_is_closed_before_its_header_is_too_long_and_not_long_before() {
        let mut tensors = tensors(300);
        for most in [3_000, 6_000, 20_000] {
            let ranges = shard_ranges(&tensors, u64::MAX, most);
            assert!(ranges.len() > 2 && ranges.iter().map(Range::len).sum::<usize>() == tensors.len());
            for (i, range) in ranges.iter().enumerate() {
                let (header_len, _) = place(&mut tensors[range.clone()], &Metadata::new());
                let len = header_len - HeaderText::LENGTH_FIELD;
                assert!(len <= most && (i + 1 == ranges.len() || len > most / 2), "{len} bytes of {most}");
            }
        }
        assert_eq!(shard_ranges(&tensors, u64::MAX, MAX_HEADER_LEN).len(), 1);
    }

    #[test]
    fn a_header_is_as_long_as_was_planned() {
        let mut tensors = tensors(100);
        let mut source = Source::of_files("source".into(), Vec::new(), None);
        source.metadata = Arc::new([("größe\n".to_owned(), "1".repeat(1000))].into());
        for file in lay_out(&mut tensors, 20_000, &source) {
            let tensors = &tensors[file.tensors.clone()];
            let parts = Part::all(tensors);
            let mut header = Vec::new();
            let mut take = |text: &[u8]| {
                header.extend_from_slice(text);
                Ok(())
            };
            file.write_header(tensors, &parts, &mut take).unwrap();
            assert_eq!(header.len() as u64, file.header_len);
            let ends = parts.iter().map(|part| part.of(tensors).offset + part.of(tensors).len);
            assert_eq!(ends.max(), Some(file.len));
        }
    }
}
