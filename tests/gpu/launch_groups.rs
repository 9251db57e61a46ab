//! The GPU's kernels for groups on the CPU, held to the specification.

use prequant::FloatDtype;
use prequant::internal::backend::cuda::{GroupKernel, THREADS, largest_name, largest_thread_blocks, tensor_factor};
use prequant::internal::format::Coding;
use prequant::internal::kernel::Kernel;
use prequant::internal::kernel::group::scalar;
use ptx_interpreter::{Fault, Memory};

use super::launch::{Kernels, upload, words};
use crate::support::codings;
use crate::support::groups::{self, Quantized};

/// Rows to quantize: what a kernel is given.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub source: &'a [u8],
    pub dtype: FloatDtype,
    pub columns: usize,
    pub group: usize,
    pub scheme: Coding,
}

impl Rows<'_> {
    fn group_len(&self) -> usize {
        self.group * self.dtype.size()
    }

    fn groups(&self) -> usize {
        self.source.len() / self.group_len()
    }

    fn kernel(&self) -> GroupKernel {
        GroupKernel::new(Coding { group: self.group, ..self.scheme }, self.columns).expect("a kernel")
    }

    /// The bytes of a group's codes.
    fn packed(&self, group: usize) -> std::ops::Range<usize> {
        let per_row = self.columns / self.group;
        let row = self.scheme.packed_row(self.columns);
        let start = group / per_row * row + group % per_row * self.group / 2;
        start..start + if per_row == 1 { row } else { self.group / 2 }
    }
}

/// Every scheme, with what the plan would give it for this source.
pub fn schemes(source: &[u8], dtype: FloatDtype) -> [Coding; 5] {
    let absmax = scalar::absmax(source, dtype).unwrap_or(1.0);
    [
        codings::INT4,
        codings::INT4_ASYM,
        codings::nvfp4(scalar::global_scale(absmax, dtype)),
        codings::nvfp4_modelopt(scalar::scale_2(absmax)),
        codings::MXFP4,
    ]
}

impl Kernels {
    /// What the kernel makes of the rows, or what it did wrong on the way.
    pub fn quantize_groups(&self, rows: Rows<'_>) -> Result<Quantized, Fault> {
        let Rows { source, dtype, columns, group, scheme } = rows;
        let (count, kernel) = (rows.groups(), rows.kernel());
        let mut memory = Memory::new();
        let from = upload(&mut memory, source)?;
        let points = if scheme.has_zero_points() { count } else { 0 };
        let packed_len = count * group / columns * scheme.packed_row(columns);
        let lens = [packed_len, count * scheme.scale_size(dtype), points, 16 * count];
        let results = lens.map(|len| memory.allocate(len));
        let mut params = vec![from.to_le_bytes().to_vec()];
        let numbers = [count as u32, group as u32, tensor_factor(scheme).to_bits()];
        params.extend(numbers.map(|n| n.to_le_bytes().to_vec()));
        params.extend(results.map(|address| address.to_le_bytes().to_vec()));
        let grid = [kernel.thread_blocks(count), 1, 1];
        self.entry(&kernel.name(dtype)).launch(&mut memory, grid, [THREADS, 1, 1], &params)?;

        let mut read = |i: usize| memory.read(results[i], lens[i]);
        let (packed, scales, zero_points, all) = (read(0)?, read(1)?, read(2)?, words(&read(3)?));
        let figures = std::array::from_fn(|i| all[i * count..][..count].to_vec());
        Ok(Quantized { packed, scales, zero_points, figures })
    }

    /// The largest magnitude that the kernel finds; `None` if something isn't finite.
    pub fn largest(&self, source: &[u8], dtype: FloatDtype) -> Result<Option<f32>, Fault> {
        let rounds = source.len() / (8 * dtype.size());
        let mut memory = Memory::new();
        let from = upload(&mut memory, source)?;
        // Half as many thread blocks as there could be, so that threads take several rounds.
        let grid = largest_thread_blocks(rounds).div_ceil(2);
        let to = memory.allocate(4 * grid as usize);
        let params = [from.to_le_bytes().to_vec(), (rounds as u32).to_le_bytes().to_vec(), to.to_le_bytes().to_vec()];
        self.entry(&largest_name(dtype)).launch(&mut memory, [grid, 1, 1], [THREADS, 1, 1], &params)?;
        let largest = words(&memory.read(to, 4 * grid as usize)?).into_iter().max().unwrap();
        Ok(Some(f32::from_bits(largest)).filter(|absmax| absmax.is_finite()))
    }

    /// Holds the largest magnitude to the specification.
    pub fn check_largest(&self, source: &[u8], dtype: FloatDtype) -> Result<(), String> {
        let case = format!("{}, {} elements", largest_name(dtype), source.len() / dtype.size());
        let found = self.largest(source, dtype).map_err(|fault| format!("{case}: {fault}"))?;
        let expected = scalar::absmax(source, dtype).ok();
        if found.map(f32::to_bits) == expected.map(f32::to_bits) {
            return Ok(());
        }
        Err(format!("{case}: {found:?}, expected {expected:?}"))
    }

    /// Holds the kernel to the specification; for groups with a NaN or an infinity, to what it promises of them.
    pub fn check_groups(&self, rows: Rows<'_>) -> Result<(), String> {
        let Rows { dtype, columns, group, scheme, .. } = rows;
        let mut source = rows.source.to_vec();
        let bad: Vec<bool> = source
            .chunks_mut(rows.group_len())
            .map(|group| {
                let bad = scalar::absmax(group, dtype).is_err();
                if bad {
                    group.fill(0);
                }
                bad
            })
            .collect();
        let mut expected = groups::quantize(Kernel::SCALAR, &source, dtype, columns, group, scheme).unwrap();
        let name = rows.kernel().name(dtype);
        let case = |wrong: String| {
            format!("{name}, {} rows of {columns}, groups of {group}: {wrong}", rows.groups() * group / columns)
        };
        let mut found = self.quantize_groups(rows).map_err(|fault| case(fault.to_string()))?;
        for i in (0..bad.len()).filter(|&i| bad[i]) {
            if !f32::from_bits(found.figures[0][i]).is_nan() {
                return Err(case(format!("group {i} isn't finite, and its absmax doesn't tell")));
            }
            // Nothing else is promised.
            expected.packed[rows.packed(i)].copy_from_slice(&found.packed[rows.packed(i)]);
            let (size, figures) = (scheme.scale_size(dtype), &found.figures);
            expected.scales[i * size..][..size].copy_from_slice(&found.scales[i * size..][..size]);
            if let Some(point) = expected.zero_points.get_mut(i) {
                *point = found.zero_points[i];
            }
            expected.figures.iter_mut().zip(figures).for_each(|(to, from)| to[i] = from[i]);
        }
        // One NaN is as good as another.
        for figure in expected.figures.iter_mut().chain(&mut found.figures).flatten() {
            *figure = if f32::from_bits(*figure).is_nan() { f32::NAN.to_bits() } else { *figure };
        }
        found.difference(&expected).map_or(Ok(()), |wrong| Err(case(wrong)))
    }
}
