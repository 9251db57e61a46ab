//! Codes of four bits: a group has sixteen possible outputs, which are made once and then looked up.

use super::Run;

/// Decodes groups of codes; `values(i)` are the values that the sixteen codes have in the `i`th group of the run.
///
/// `EVEN_HIGH` says which half of a byte the element of an even column is in.
#[inline(always)]
pub(crate) fn decode<const SIZE: usize, const EVEN_HIGH: bool>(
    run: Run<'_, SIZE>,
    values: impl Fn(usize) -> [f32; 16],
    round: impl Fn(f32) -> [u8; SIZE],
) {
    let groups = run.groups();
    let Run { first, codes, mut into, .. } = run;
    for (i, columns) in groups.enumerate() {
        // A loop and not map(), which compilers don't turn into vector instructions.
        let mut outputs = [[0; SIZE]; 16];
        for (output, value) in outputs.iter_mut().zip(values(i)) {
            *output = round(value);
        }
        let (elements, rest) = into.split_at_mut(columns.len());
        into = rest;
        let codes = &codes[columns.start / 2 - first / 2..];
        look_up::<SIZE, EVEN_HIGH>(&outputs, codes, columns.start % 2 == 1, elements);
    }
}

/// Writes the outputs of codes; `odd` says that the first is its byte's second.
#[inline(always)]
fn look_up<const SIZE: usize, const EVEN_HIGH: bool>(
    outputs: &[[u8; SIZE]; 16],
    mut codes: &[u8],
    odd: bool,
    mut into: &mut [[u8; SIZE]],
) {
    let both = |byte: u8| {
        let [low, high] = [byte & 15, byte >> 4].map(|code| outputs[usize::from(code)]);
        if EVEN_HIGH { [high, low] } else { [low, high] }
    };
    if odd && let [element, rest @ ..] = into {
        [_, *element] = both(codes[0]);
        (codes, into) = (&codes[1..], rest);
    }
    let (pairs, last) = into.as_chunks_mut();
    for (pair, &byte) in pairs.iter_mut().zip(codes) {
        *pair = both(byte);
    }
    if let [element] = last {
        [*element, _] = both(codes[pairs.len()]);
    }
}
