//! Integers of four bits as GPTQ and AWQ store them, inputs by outputs: transposed, they are compressed-tensors' INT4 with zero points.

use serde_json::Value;

use crate::checkpoint::{Source, TensorInfo};
use crate::dtype::{Dtype, FloatDtype};
use crate::format::{Coding, ElementCode, ScaleCode};
use crate::read::{Change, Decode, Input, Read, Span, Tensors};

/// The end of the codes' name, after the module's.
pub(super) const CODES: &str = ".qweight";
const ZEROS: &str = ".qzeros";
const SCALES: &str = ".scales";
const ORDER: &str = ".g_idx";

/// A tensor with its place.
type Placed<'a> = (Span, &'a TensorInfo);

/// A weight `[rows, columns]` whose codes stand by columns.
pub(crate) struct Integers<'a> {
    /// The name of its module.
    pub(super) module: &'a str,
    pub(super) packing: Packing,
    codes: Placed<'a>,
    zeros: Placed<'a>,
    scales: Placed<'a>,
    order: Option<Placed<'a>>,
    rows: u64,
    groups: u64,
}

/// What eight codes in a word are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Packing {
    /// Of eight columns in one row: `qweight` is `[columns / 8, rows]`.
    Gptq,
    /// Of eight rows in one column, in AWQ's order: `qweight` is `[columns, rows / 8]`.
    Awq,
}

/// What the plan reads of a weight before it can be decoded.
pub(super) struct Contents {
    /// The first zero points, as they are stored.
    pub(super) zeros: Vec<u8>,
    /// The group of each column, if there is such a tensor.
    pub(super) order: Option<Vec<u8>>,
}

/// Zero points that are looked at to tell GPTQ's versions apart, in bytes.
const ZEROS_SEEN: u64 = 1 << 20;

impl<'a> Integers<'a> {
    /// The weight whose codes a tensor is, if its parts are those of four bits.
    pub(super) fn of(codes: &'a TensorInfo, tensors: &Tensors<'a>) -> Option<Integers<'a>> {
        let module = codes.name.strip_suffix(CODES)?;
        let part = |end: &str| tensors.get(&format!("{module}{end}"));
        let (place, zeros, scales, order) = (part(CODES)?, part(ZEROS)?, part(SCALES)?, part(ORDER));
        let (&[stored, wide], &[groups, rows]) = (&codes.shape[..], &scales.1.shape[..]) else { return None };
        let packing = match wide {
            wide if wide == rows => Packing::Gptq,
            wide if wide.checked_mul(8) == Some(rows) => Packing::Awq,
            _ => return None,
        };
        let is_integer = |(_, info): Placed<'_>| info.dtype == Dtype::I32;
        let fits = zeros.1.shape[..] == [groups, rows.div_ceil(8)]
            && [stored, rows, groups].iter().all(|&dimension| dimension > 0)
            && is_integer(place)
            && is_integer(zeros)
            && order.is_none_or(is_integer)
            && FloatDtype::of(scales.1.dtype).is_some();
        fits.then_some(Integers { module, packing, codes: place, zeros, scales, order, rows, groups })
    }

    /// The tensors beside its codes.
    pub(super) fn beside(&self) -> Vec<&'a TensorInfo> {
        [self.zeros.1, self.scales.1].into_iter().chain(self.order.map(|(_, info)| info)).collect()
    }

    /// What has to be read of it before: the places, in the order of [`Contents`].
    pub(super) fn to_read(&self) -> (Span, Option<Span>) {
        let zeros = self.zeros.0;
        (zeros.part(0, zeros.len.min(ZEROS_SEEN)), self.order.map(|(span, _)| span))
    }

    /// Elements of a row.
    fn columns(&self) -> Result<u64, String> {
        let stored = self.codes.1.shape[0];
        let most = if self.packing == Packing::Gptq { stored.saturating_mul(8) } else { stored };
        match self.order {
            // The last word may be in part used.
            Some((_, order)) if self.packing == Packing::Gptq => match order.shape[..] {
                [columns] if columns.div_ceil(8) == stored => Ok(columns),
                _ => Err(format!("{:?} has the shape {:?}, expected [{most}]", order.name, order.shape)),
            },
            _ => Ok(most),
        }
    }

    /// What it decodes to.
    ///
    /// # Errors
    /// When its parts don't fit each other.
    pub(super) fn decoded(&self, settings: &Settings, contents: &Contents, version: Version) -> Result<Input, String> {
        let (rows, columns, groups) = (self.rows, self.columns()?, self.groups);
        let group = settings.group(columns, groups)?;
        let order = contents.order.as_deref().filter(|_| self.packing == Packing::Gptq);
        let is_ordered = order.map(|order| is_ordered(order, group, groups)).transpose()?.unwrap_or(false);
        let dtype = FloatDtype::of(self.scales.1.dtype).ok_or("its scales are no floats")?;
        let transposed = |place: Placed<'_>, size: usize| match place.1.shape[..] {
            [a, b] => Read::Bytes(place.0).transposed([a, b], size),
            _ => unreachable!("of() has seen that it is a matrix"),
        };
        let (codes, zeros) = (transposed(self.codes, 4), transposed(self.zeros, 4));
        let (codes, zeros) = match (self.packing, version) {
            (Packing::Gptq, Version::V2) => (codes, zeros),
            (Packing::Gptq, Version::V1) => (codes, zeros.words(Change::AddOnes)),
            (Packing::Awq, _) => {
                (codes.words(Change::FromAwq).nibbles_by_row(rows, columns), zeros.words(Change::FromAwq))
            }
        };
        let element = ElementCode::Int { zero_point: true };
        let read = Read::decode(Decode {
            // Columns in any order still are as many groups.
            coding: Coding::new(
                element,
                ScaleCode::SourceFloat,
                if is_ordered { columns.div_ceil(groups) } else { group } as usize,
            ),
            dtype,
            rows,
            columns,
            row_len: element.packed_row(columns),
            group_rows: 1,
            codes,
            scales: transposed(self.scales, dtype.size()),
            zero_points: Some(zeros),
            order: self.order.filter(|_| is_ordered).map(|(span, _)| Read::Bytes(span)),
            nested: None,
        })?;
        Ok(Input::decoded(format!("{}.weight", self.module), vec![rows, columns], dtype, read))
    }
}

/// Whether columns of one group don't stand together.
fn is_ordered(order: &[u8], group: u64, groups: u64) -> Result<bool, String> {
    let of_columns = order.as_chunks().0.iter().map(|group| i32::from_le_bytes(*group));
    let mut is_ordered = false;
    for (column, found) in (0u64..).zip(of_columns) {
        match u64::try_from(found) {
            Ok(found) if found < groups => is_ordered |= found != column / group,
            _ => {
                return Err(format!("its {ORDER} has column {column} in group {found}, and there are {groups} groups"));
            }
        }
    }
    Ok(is_ordered)
}

/// What GPTQ's zero points are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Version {
    /// One less than they are.
    V1,
    /// As they are.
    V2,
}

/// What config.json says of integers.
pub(super) struct Settings {
    group_size: Option<i64>,
    /// Whether all zero points are 8.
    symmetric: Option<bool>,
    checkpoint_format: Option<String>,
}

impl Settings {
    /// Of an opened source.
    pub(super) fn of(source: &Source) -> Settings {
        let config = source.config.as_ref().and_then(|config| config.values().get("quantization_config"));
        let value = |key: &str| config.and_then(|config| config.get(key));
        Settings {
            group_size: value("group_size").and_then(Value::as_i64),
            symmetric: value("sym").and_then(Value::as_bool),
            checkpoint_format: value("checkpoint_format").and_then(Value::as_str).map(str::to_owned),
        }
    }

    /// Columns of a group, of `groups` in a row.
    fn group(&self, columns: u64, groups: u64) -> Result<u64, String> {
        let of_config = self.group_size.and_then(|size| u64::try_from(size).ok()).filter(|&size| size > 0);
        match of_config {
            Some(size) if columns.div_ceil(size) == groups => Ok(size),
            _ if columns.is_multiple_of(groups) => Ok(columns / groups),
            _ => Err(format!("{columns} columns don't divide into {groups} groups")),
        }
    }

    /// What a weight's zero points are stored as, by what they are where that tells, and otherwise by config.json; also whether these
    /// contradict each other.
    pub(super) fn version(&self, zeros: &[u8]) -> (Version, bool) {
        let says = self.checkpoint_format.as_deref();
        let of_config = if says == Some("gptq_v2") { Version::V2 } else { Version::V1 };
        let all = |byte: u8| self.symmetric != Some(false) && zeros.iter().all(|&found| found == byte);
        let version = match () {
            () if all(0x77) => Version::V1,
            () if all(0x88) => Version::V2,
            () => of_config,
        };
        (version, says.is_some() && version != of_config)
    }

    /// config.json's word for how tensors are laid out, if it is one whose rules aren't known.
    pub(super) fn unknown_format(&self) -> Option<&str> {
        const KNOWN: [&str; 3] = ["gptq", "gptq_v2", "gemm"];
        self.checkpoint_format.as_deref().filter(|format| !KNOWN.contains(format))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(symmetric: Option<bool>, checkpoint_format: Option<&str>) -> Settings {
        Settings { group_size: None, symmetric, checkpoint_format: checkpoint_format.map(str::to_owned) }
    }

    #[test]
    fn symmetric_zero_points_tell_the_version_and_others_leave_it_to_the_config() {
        use Version::{V1, V2};
        let (seven, eight, mixed) = ([0x77; 8], [0x88; 8], [0x77, 0x88]);
        for symmetric in [None, Some(true)] {
            let with = |format| settings(symmetric, format);
            assert_eq!(with(None).version(&seven), (V1, false));
            assert_eq!(with(None).version(&eight), (V2, false));
            assert_eq!(with(Some("gptq")).version(&seven), (V1, false));
            assert_eq!(with(Some("gptq")).version(&eight), (V2, true));
            assert_eq!(with(Some("gptq_v2")).version(&seven), (V1, true));
            assert_eq!(with(Some("gptq_v2")).version(&mixed), (V2, false));
            assert_eq!(with(None).version(&mixed), (V1, false));
        }
        for zeros in [&seven[..], &eight, &mixed] {
            assert_eq!(settings(Some(false), Some("gptq_v2")).version(zeros), (V2, false));
            assert_eq!(settings(Some(false), Some("gptq")).version(zeros), (V1, false));
            assert_eq!(settings(Some(false), None).version(zeros), (V1, false));
        }
    }

    #[test]
    fn groups_in_their_order_are_told_from_others() {
        let order = |groups: &[i32]| groups.iter().flat_map(|group| group.to_le_bytes()).collect::<Vec<u8>>();
        assert_eq!(is_ordered(&order(&[0, 0, 1, 1, 2]), 2, 3), Ok(false));
        assert_eq!(is_ordered(&order(&[0, 1, 0, 1, 2]), 2, 3), Ok(true));
        assert!(is_ordered(&order(&[0, 3]), 2, 3).unwrap_err().contains("column 1 in group 3"));
        assert!(is_ordered(&order(&[0, -1]), 2, 3).unwrap_err().contains("group -1"));
    }
}
