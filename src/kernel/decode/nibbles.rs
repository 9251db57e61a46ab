//! Codes of four bits: a group has sixteen possible outputs, which are made once and then looked up.

use super::Run;

/// How the outputs of whole bytes of codes are looked up.
pub(super) trait LookUp {
    /// Writes the outputs of two codes for each byte, as far as this way is meant for it; returns the number of bytes.
    ///
    /// `EVEN_HIGH` says which half of a byte the element of an even column is in.
    fn pairs<const SIZE: usize, const EVEN_HIGH: bool>(
        outputs: &[[u8; SIZE]; 16],
        codes: &[u8],
        into: &mut [[[u8; SIZE]; 2]],
    ) -> usize;
}

/// One by one.
pub(super) struct OneByOne;

impl LookUp for OneByOne {
    #[inline(always)]
    fn pairs<const SIZE: usize, const EVEN_HIGH: bool>(
        outputs: &[[u8; SIZE]; 16],
        codes: &[u8],
        into: &mut [[[u8; SIZE]; 2]],
    ) -> usize {
        for (pair, &byte) in into.iter_mut().zip(codes) {
            *pair = both::<SIZE, EVEN_HIGH>(outputs, byte);
        }
        into.len()
    }
}

/// Decodes groups of codes; `values(i)` are the values that the sixteen codes have in the `i`th group of the run.
#[inline(always)]
pub(super) fn decode<L: LookUp, const SIZE: usize, const EVEN_HIGH: bool>(
    run: Run<'_, SIZE>,
    values: impl Fn(usize) -> [f32; 16],
    round: impl Fn(f32) -> [u8; SIZE],
) {
    let groups = run.groups();
    let Run { first, codes, mut into, .. } = run;
    for (i, columns) in groups.enumerate() {
        let mut outputs = [[0; SIZE]; 16];
        for (output, value) in outputs.iter_mut().zip(values(i)) {
            *output = round(value);
        }
        let (elements, rest) = into.split_at_mut(columns.len());
        into = rest;
        let codes = &codes[columns.start / 2 - first / 2..];
        look_up::<L, SIZE, EVEN_HIGH>(&outputs, codes, columns.start % 2 == 1, elements);
    }
}

/// Values times a scale. A loop and not map(), which compilers don't turn into vector instructions.
#[inline(always)]
pub(super) fn times(values: &[f32; 16], scale: f32) -> [f32; 16] {
    let mut products = [0.0; 16];
    for (product, value) in products.iter_mut().zip(values) {
        *product = value * scale;
    }
    products
}

/// Writes the outputs of codes; `odd` says that the first is its byte's second.
#[inline(always)]
fn look_up<L: LookUp, const SIZE: usize, const EVEN_HIGH: bool>(
    outputs: &[[u8; SIZE]; 16],
    mut codes: &[u8],
    odd: bool,
    mut into: &mut [[u8; SIZE]],
) {
    if odd && let [element, rest @ ..] = into {
        [_, *element] = both::<SIZE, EVEN_HIGH>(outputs, codes[0]);
        (codes, into) = (&codes[1..], rest);
    }
    let (pairs, last) = into.as_chunks_mut();
    let (codes, of_last) = codes.split_at(pairs.len());
    let done = L::pairs::<SIZE, EVEN_HIGH>(outputs, codes, pairs);
    OneByOne::pairs::<SIZE, EVEN_HIGH>(outputs, &codes[done..], &mut pairs[done..]);
    if let [element] = last {
        [*element, _] = both::<SIZE, EVEN_HIGH>(outputs, of_last[0]);
    }
}

/// The outputs of a byte's codes.
#[inline(always)]
fn both<const SIZE: usize, const EVEN_HIGH: bool>(outputs: &[[u8; SIZE]; 16], byte: u8) -> [[u8; SIZE]; 2] {
    let [low, high] = [byte & 15, byte >> 4].map(|code| outputs[usize::from(code)]);
    if EVEN_HIGH { [high, low] } else { [low, high] }
}
