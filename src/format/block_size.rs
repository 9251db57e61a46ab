//! Block sizes bitsandbytes accepts.

use std::fmt;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The number of consecutive elements of the flattened tensor that share one absmax.
///
/// A power of two from 32 to 4096; 64 by default, as in bitsandbytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(try_from = "u32", into = "u32")]
#[schemars(extend("enum" = [32, 64, 128, 256, 512, 1024, 2048, 4096]))]
pub struct BlockSize(u32);

impl BlockSize {
    /// The largest block size: every run of this many elements is whole blocks, whatever the block size.
    pub const MAX: usize = 4096;

    /// Elements in a block.
    pub fn get(self) -> usize {
        self.0 as usize
    }

    /// Blocks in a tensor of `elements`; the last one may be short.
    pub fn blocks(self, elements: u64) -> u64 {
        elements.div_ceil(u64::from(self.0))
    }
}

impl Default for BlockSize {
    fn default() -> Self {
        BlockSize(64)
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = String;

    fn try_from(size: u32) -> Result<Self, String> {
        if size.is_power_of_two() && (32..=Self::MAX as u32).contains(&size) {
            Ok(BlockSize(size))
        } else {
            Err(format!("block size {size}: expected 32, 64, 128, 256, 512, 1024, 2048 or 4096"))
        }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> u32 {
        size.0
    }
}

impl FromStr for BlockSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let size: u32 = text
            .parse()
            .map_err(|_| format!("block size {text:?}: expected 32, 64, 128, 256, 512, 1024, 2048 or 4096"))?;
        Self::try_from(size)
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_from_32_to_4096_are_block_sizes() {
        let accepted: Vec<u32> = (0..10_000).filter(|&n| BlockSize::try_from(n).is_ok()).collect();
        assert_eq!(accepted, [32, 64, 128, 256, 512, 1024, 2048, 4096]);
    }
}
