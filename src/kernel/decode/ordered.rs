//! Codes of four bits whose columns are in any order of groups: the outputs of all groups are made once for each row, and then looked up.

use super::{Order, Run};

/// Decodes a run of a row; `values(i)` are the values that the sixteen codes have in its `i`th group.
///
/// # Panics
/// When a column is in a group that there isn't.
pub(super) fn decode<const SIZE: usize>(
    run: Run<'_, SIZE>,
    order: Order<'_>,
    values: impl Fn(usize) -> [f32; 16],
    round: impl Fn(f32) -> [u8; SIZE],
) {
    let outputs: Vec<[[u8; SIZE]; 16]> = (0..order.groups).map(|group| values(group).map(&round)).collect();
    let Run { first, codes, into, .. } = run;
    for ((column, element), &group) in (first..).zip(into).zip(order.of_columns) {
        let byte = codes[column / 2 - first / 2];
        *element = outputs[group as usize][usize::from(byte >> (column % 2 * 4) & 15)];
    }
}
