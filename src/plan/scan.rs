//! What the plan must know of numbers in the source: scales, zero points, codes of groups.

use crate::checkpoint::Source;
use crate::error::Result;
use crate::kernel::Kernel;
use crate::read::{Decode, Evaluator, Read, SmallTensors};

/// Bytes that are looked at at once.
const PIECE: u64 = 1 << 20;

/// Reads scales, zero points and codes piece by piece.
pub(super) struct Scan<'a> {
    small: SmallTensors<'a>,
    evaluator: Evaluator,
}

impl<'a> Scan<'a> {
    /// Of an opened source.
    pub(super) fn new(source: &'a Source) -> Scan<'a> {
        Scan { small: SmallTensors::new(source), evaluator: Evaluator::new(Kernel::SCALAR) }
    }

    fn read(&mut self, read: &Read, offset: u64, len: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len as usize];
        let Scan { small, evaluator } = self;
        evaluator.read(read, offset, &mut bytes, &mut |span, into| small.fill(span, into))?;
        Ok(bytes)
    }

    /// How often each byte occurs.
    pub(super) fn counts(&mut self, read: &Read) -> Result<[u64; 256]> {
        let mut counts = [0; 256];
        for offset in (0..read.len()).step_by(PIECE as usize) {
            let piece = self.read(read, offset, PIECE.min(read.len() - offset))?;
            piece.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
        }
        Ok(counts)
    }

    /// The least and the largest exponent of groups that aren't all zeros; none if all are.
    pub(super) fn exponents(&mut self, matrix: &Decode) -> Result<Option<[u8; 2]>> {
        let group = matrix.coding.group as u64 / 2;
        let mut found: Option<[u8; 2]> = None;
        for first in (0..matrix.scales.len()).step_by((PIECE / group) as usize) {
            let count = (PIECE / group).min(matrix.scales.len() - first);
            let (scales, codes) =
                (self.read(&matrix.scales, first, count)?, self.read(&matrix.codes, first * group, count * group)?);
            let groups = scales.iter().zip(codes.chunks(group as usize));
            for (&scale, _) in groups.filter(|(_, codes)| codes.iter().any(|byte| byte & 0x77 != 0)) {
                let [least, most] = found.unwrap_or([scale; 2]);
                found = Some([least.min(scale), most.max(scale)]);
            }
        }
        Ok(found)
    }

    /// Whether every byte is this one; looks no further than the first that isn't.
    pub(super) fn is_all(&mut self, read: &Read, byte: u8) -> Result<bool> {
        for offset in (0..read.len()).step_by(PIECE as usize) {
            let piece = self.read(read, offset, PIECE.min(read.len() - offset))?;
            if piece.iter().any(|found| *found != byte) {
                return Ok(false);
            }
        }
        Ok(true)
    }
}
