//! Two streams' blocks compressed in one loop, with the SHA instructions of x86-64.
//!
//! A round's instruction waits for the result of the one before, so a stream alone leaves the unit idle half of the
//! time; the other stream's rounds go in between. Names are Intel's: A to H are the state's words, and a register holds
//! them from its highest word to its lowest.

use std::arch::asm;
use std::arch::x86_64::{
    __m128i, _mm_add_epi32, _mm_alignr_epi8, _mm_blend_epi16, _mm_loadu_si128, _mm_set_epi64x, _mm_sha256msg1_epu32,
    _mm_sha256msg2_epu32, _mm_shuffle_epi8, _mm_shuffle_epi32, _mm_storeu_si128,
};
use std::array;

use super::BLOCK;

/// The rounds' constants, four rounds' in a row, and those of sixteen rounds together: FIPS 180-4, section 4.2.2.
static ROUNDS: [[[u32; 4]; 4]; 4] = [
    [
        [0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5],
        [0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5],
        [0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3],
        [0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174],
    ],
    [
        [0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc],
        [0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da],
        [0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7],
        [0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967],
    ],
    [
        [0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13],
        [0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85],
        [0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3],
        [0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070],
    ],
    [
        [0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5],
        [0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3],
        [0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208],
        [0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2],
    ],
];

/// Whether this processor runs [`compress_two`] on any blocks.
pub(super) fn available() -> bool {
    is_x86_feature_detected!("sha") && is_x86_feature_detected!("ssse3") && is_x86_feature_detected!("sse4.1")
}

/// Compresses as many blocks of one stream as of another.
///
/// # Panics
/// When the numbers of blocks differ, or there are blocks and the processor lacks the instructions.
pub(super) fn compress_two(states: [&mut [u32; 8]; 2], blocks: [&[[u8; BLOCK]]; 2]) {
    assert_eq!(blocks[0].len(), blocks[1].len());
    if !blocks[0].is_empty() {
        assert!(available());
        let pairs = blocks[0].iter().zip(blocks[1]).map(|(a, b)| [a, b]);
        // SAFETY: the processor has the features, as just asserted.
        unsafe { compress(states, pairs) }
    }
}

/// Compresses the same blocks of two streams, whose schedules are one.
///
/// # Panics
/// When there are blocks and the processor lacks the instructions.
pub(super) fn compress_same(states: [&mut [u32; 8]; 2], blocks: &[[u8; BLOCK]]) {
    if !blocks.is_empty() {
        assert!(available());
        // SAFETY: the processor has the features, as just asserted.
        unsafe { compress(states, blocks.iter().map(|block| [block])) }
    }
}

/// A stream's state, as the rounds' instruction takes it.
#[derive(Clone, Copy)]
struct State {
    abef: __m128i,
    cdgh: __m128i,
}

/// The last sixteen words of a schedule.
type Words = [__m128i; 4];

/// Compresses blocks of two streams: each stream's own, or one of both.
#[target_feature(enable = "sha,sse2,ssse3,sse4.1")]
fn compress<'b, const OWN: usize>(states: [&mut [u32; 8]; 2], blocks: impl Iterator<Item = [&'b [u8; BLOCK]; OWN]>) {
    let mut state = [load_state(states[0]), load_state(states[1])];
    for blocks in blocks {
        let before = state;
        let mut words: [Words; OWN] = array::from_fn(|i| load_block(blocks[i]));
        let [first, others @ ..] = &ROUNDS;
        four_rounds::<0, OWN>(first, &mut state, &words);
        four_rounds::<1, OWN>(first, &mut state, &words);
        four_rounds::<2, OWN>(first, &mut state, &words);
        four_rounds::<3, OWN>(first, &mut state, &words);
        for constants in others {
            next_words::<0, OWN>(&mut words);
            four_rounds::<0, OWN>(constants, &mut state, &words);
            next_words::<1, OWN>(&mut words);
            four_rounds::<1, OWN>(constants, &mut state, &words);
            next_words::<2, OWN>(&mut words);
            four_rounds::<2, OWN>(constants, &mut state, &words);
            next_words::<3, OWN>(&mut words);
            four_rounds::<3, OWN>(constants, &mut state, &words);
        }
        for (state, before) in state.iter_mut().zip(before) {
            state.abef = _mm_add_epi32(state.abef, before.abef);
            state.cdgh = _mm_add_epi32(state.cdgh, before.cdgh);
        }
    }
    for (state, into) in state.into_iter().zip(states) {
        store_state(state, into);
    }
}

/// Four rounds of both streams with the words at `AT`: each instruction for one stream, then for the other. Compilers put all rounds
/// of a stream in a row, and the words of the other in memory until then.
///
/// `AT` is known to the compiler, so that it keeps schedules in registers: in memory they are several times as slow.
#[inline]
#[target_feature(enable = "sha,sse2")]
fn four_rounds<const AT: usize, const OWN: usize>(
    constants: &[[u32; 4]; 4],
    state: &mut [State; 2],
    words: &[Words; OWN],
) {
    let constants = load(&constants[AT]);
    let words: [__m128i; OWN] = array::from_fn(|i| _mm_add_epi32(words[i][AT], constants));
    let [a, b] = state;
    // SAFETY: it has the instructions, and changes nothing but the registers it names.
    unsafe {
        asm!(
            "movdqa xmm0, {words_a}",
            "sha256rnds2 {cdgh_a}, {abef_a}, xmm0",
            "movdqa xmm0, {words_b}",
            "sha256rnds2 {cdgh_b}, {abef_b}, xmm0",
            "pshufd xmm0, {words_a}, 14",
            "sha256rnds2 {abef_a}, {cdgh_a}, xmm0",
            "pshufd xmm0, {words_b}, 14",
            "sha256rnds2 {abef_b}, {cdgh_b}, xmm0",
            words_a = in(xmm_reg) words[0],
            words_b = in(xmm_reg) words[OWN - 1],
            abef_a = inout(xmm_reg) a.abef,
            cdgh_a = inout(xmm_reg) a.cdgh,
            abef_b = inout(xmm_reg) b.abef,
            cdgh_b = inout(xmm_reg) b.cdgh,
            out("xmm0") _,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
}

/// Puts the four words of the schedule that follow the last sixteen in the place of the oldest four, which are at `AT`.
#[inline]
#[target_feature(enable = "sha,sse2,ssse3")]
fn next_words<const AT: usize, const OWN: usize>(words: &mut [Words; OWN]) {
    for last in words {
        let [w0, w4, w8, w12] = [last[AT], last[(AT + 1) % 4], last[(AT + 2) % 4], last[(AT + 3) % 4]];
        let w9 = _mm_alignr_epi8::<4>(w12, w8);
        last[AT] = _mm_sha256msg2_epu32(_mm_add_epi32(_mm_sha256msg1_epu32(w0, w4), w9), w12);
    }
}

/// A block's sixteen words, which are big-endian.
#[inline]
#[target_feature(enable = "sse2,ssse3")]
fn load_block(block: &[u8; BLOCK]) -> [__m128i; 4] {
    let swap_bytes = _mm_set_epi64x(0x0c0d_0e0f_0809_0a0b, 0x0405_0607_0001_0203);
    let (quarters, _) = block.as_chunks::<16>();
    array::from_fn(|i| _mm_shuffle_epi8(load(&quarters[i]), swap_bytes))
}

#[inline]
#[target_feature(enable = "sse2,ssse3,sse4.1")]
fn load_state(state: &[u32; 8]) -> State {
    let (halves, _) = state.as_chunks::<4>();
    let (cdab, efgh) = (_mm_shuffle_epi32::<0xb1>(load(&halves[0])), _mm_shuffle_epi32::<0x1b>(load(&halves[1])));
    State { abef: _mm_alignr_epi8::<8>(cdab, efgh), cdgh: _mm_blend_epi16::<0xf0>(efgh, cdab) }
}

#[inline]
#[target_feature(enable = "sse2,ssse3,sse4.1")]
fn store_state(state: State, into: &mut [u32; 8]) {
    let (feba, dchg) = (_mm_shuffle_epi32::<0x1b>(state.abef), _mm_shuffle_epi32::<0xb1>(state.cdgh));
    let (halves, _) = into.as_chunks_mut::<4>();
    for (half, words) in halves.iter_mut().zip([_mm_blend_epi16::<0xf0>(feba, dchg), _mm_alignr_epi8::<8>(dchg, feba)])
    {
        // SAFETY: the four words are the 16 bytes that it writes, and it asks for no alignment.
        unsafe { _mm_storeu_si128(half.as_mut_ptr().cast(), words) }
    }
}

/// The bytes of an array of 16.
#[inline]
#[target_feature(enable = "sse2")]
fn load<T: Copy, const N: usize>(from: &[T; N]) -> __m128i {
    const { assert!(size_of::<[T; N]>() == 16) };
    // SAFETY: the array is the 16 bytes that it reads, as just asserted, and it asks for no alignment.
    unsafe { _mm_loadu_si128(from.as_ptr().cast()) }
}
