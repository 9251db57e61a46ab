//! SHA-256 of one stream of bytes, or of two at once on one core.
//!
//! A single stream goes at the speed of `sha2`'s compression function, which waits for its own last result most of the
//! time. Two streams fill each other's waits where the processor has instructions for SHA-256; and where they take the same
//! blocks, as a file and a tensor do that starts at a multiple of 64 bytes of it, half of what a block needs is worked out once.

#[cfg(target_arch = "x86_64")]
mod x86;

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use sha2::block_api::compress256;

/// Bytes that are hashed to see how long it takes: some 20 microseconds' worth.
const MEASURED: usize = 32 << 10;

/// Bytes that are compressed at a time.
const BLOCK: usize = 64;

/// The state before the first block: FIPS 180-4, section 5.3.3.
const INITIAL: [u32; 8] =
    [0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19];

/// A SHA-256 of bytes that arrive piece by piece.
#[derive(Clone)]
pub struct Sha256Stream {
    state: [u32; 8],
    /// Bytes so far; the last `len % BLOCK` of them are in `pending`.
    len: u64,
    /// The start of a block that isn't whole yet.
    pending: [u8; BLOCK],
}

impl Sha256Stream {
    /// Of no bytes so far.
    pub fn new() -> Sha256Stream {
        Sha256Stream { state: INITIAL, len: 0, pending: [0; BLOCK] }
    }

    /// Takes the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let (blocks, rest) = self.take(bytes);
        compress256(&mut self.state, blocks);
        self.keep(rest);
    }

    /// The SHA-256 of all bytes taken.
    pub fn finish(mut self) -> [u8; 32] {
        let bits = self.len.wrapping_mul(8);
        // A one bit, zeros, and the length in the last eight bytes of a block.
        let zeros = (BLOCK - 9).wrapping_sub(self.pending_len()) % BLOCK;
        let mut padding = [0; 2 * BLOCK];
        padding[0] = 0x80;
        padding[1 + zeros..][..8].copy_from_slice(&bits.to_be_bytes());
        self.update(&padding[..1 + zeros + 8]);
        let mut hash = [0; 32];
        for (bytes, word) in hash.as_chunks_mut().0.iter_mut().zip(self.state) {
            *bytes = word.to_be_bytes();
        }
        hash
    }

    fn pending_len(&self) -> usize {
        (self.len % BLOCK as u64) as usize
    }

    /// Counts the next bytes, and finishes the pending block with the first of them. The whole blocks that follow it are
    /// left to be compressed, and the rest to [`keep`](Self::keep).
    fn take<'b>(&mut self, bytes: &'b [u8]) -> (&'b [[u8; BLOCK]], &'b [u8]) {
        let pending = self.pending_len();
        let missing = if pending == 0 { 0 } else { BLOCK - pending };
        self.len += bytes.len() as u64;
        let (first, others) = bytes.split_at(missing.min(bytes.len()));
        self.pending[pending..][..first.len()].copy_from_slice(first);
        if missing > 0 && first.len() == missing {
            compress256(&mut self.state, &[self.pending]);
        }
        let (blocks, rest) = others.as_chunks();
        (blocks, rest)
    }

    /// Keeps what [`take`](Self::take) left after the whole blocks: the start of the next one.
    fn keep(&mut self, rest: &[u8]) {
        self.pending[..rest.len()].copy_from_slice(rest);
    }
}

impl Default for Sha256Stream {
    fn default() -> Self {
        Self::new()
    }
}

/// How one core compresses the blocks of two streams.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairing {
    /// One stream after the other, on any machine.
    InTurn,
    /// Both in one loop, with x86-64's SHA instructions.
    #[cfg(target_arch = "x86_64")]
    Interleaved,
}

impl Pairing {
    /// The fastest that this processor runs.
    pub fn detect() -> Pairing {
        #[cfg(target_arch = "x86_64")]
        if x86::available() {
            return Pairing::Interleaved;
        }
        Pairing::InTurn
    }

    /// Every one that this processor runs.
    pub fn available() -> Vec<Pairing> {
        let mut pairings = vec![Pairing::InTurn, Pairing::detect()];
        pairings.dedup();
        pairings
    }

    /// Has each of two streams take its next bytes.
    pub fn update(self, a: &mut Sha256Stream, bytes_a: &[u8], b: &mut Sha256Stream, bytes_b: &[u8]) {
        let ((blocks_a, rest_a), (blocks_b, rest_b)) = (a.take(bytes_a), b.take(bytes_b));
        let [alone_a, alone_b] = self.compress([&mut a.state, &mut b.state], [blocks_a, blocks_b]);
        compress256(&mut a.state, alone_a);
        compress256(&mut b.state, alone_b);
        a.keep(rest_a);
        b.keep(rest_b);
    }

    /// Compresses blocks of both streams together, and leaves those that are to be compressed alone.
    #[allow(unused_variables, reason = "other architectures compress none together")]
    fn compress<'b>(self, states: [&mut [u32; 8]; 2], blocks: [&'b [[u8; BLOCK]]; 2]) -> [&'b [[u8; BLOCK]]; 2] {
        match self {
            Pairing::InTurn => blocks,
            #[cfg(target_arch = "x86_64")]
            Pairing::Interleaved if std::ptr::eq(blocks[0], blocks[1]) => {
                x86::compress_same(states, blocks[0]);
                [&[], &[]]
            }
            #[cfg(target_arch = "x86_64")]
            Pairing::Interleaved => {
                let both = blocks[0].len().min(blocks[1].len());
                x86::compress_two(states, blocks.map(|blocks| &blocks[..both]));
                blocks.map(|blocks| &blocks[both..])
            }
        }
    }
}

/// Where [`second_stream_cost`] is less than this, nothing is gained by hashing a file and its tensors apart from each other.
pub(crate) const FREE: f64 = 0.1;

/// How much longer two streams take for the same bytes than one, on this machine: 0 if they take no longer, 1 if it is twice as long.
/// Measured once.
pub(crate) fn second_stream_cost() -> f64 {
    static COST: OnceLock<f64> = OnceLock::new();
    *COST.get_or_init(|| {
        let bytes = vec![0; MEASURED];
        let [mut a, mut b] = [Sha256Stream::new(), Sha256Stream::new()];
        // The least of a few: whatever else goes on only adds to it.
        let (mut alone, mut both) = (Duration::MAX, Duration::MAX);
        for _ in 0..5 {
            let begin = Instant::now();
            a.update(&bytes);
            alone = alone.min(begin.elapsed());
            let begin = Instant::now();
            update_pair(&mut a, &mut b, &bytes);
            both = both.min(begin.elapsed());
        }
        (both.as_secs_f64() / alone.as_secs_f64().max(f64::MIN_POSITIVE) - 1.0).clamp(0.0, 1.0)
    })
}

/// Has two streams take the same bytes, as a file and a tensor in it do. Fastest where both have taken as many bytes, but for
/// whole blocks.
pub fn update_pair(a: &mut Sha256Stream, b: &mut Sha256Stream, bytes: &[u8]) {
    update_two(a, bytes, b, bytes);
}

/// Has each of two streams take its next bytes. Faster the closer their lengths are.
pub fn update_two(a: &mut Sha256Stream, bytes_a: &[u8], b: &mut Sha256Stream, bytes_b: &[u8]) {
    Pairing::detect().update(a, bytes_a, b, bytes_b);
}
