//! What quantizing a block or a group cost, as kernels tell it.

/// Blocks or groups whose figures are added in order, before the sums are; what is handed in at once is whole multiples, except at a
/// tensor's end.
pub const SUMMED: usize = 16;

/// Per-block results besides the codes. Slices of one length: the number of blocks.
pub struct BlockErrors<'a> {
    /// The block's scale, as stored.
    pub absmax: &'a mut [f32],
    /// Sum of t², where t is an element over its block's absmax (the kernels' own scaled element).
    pub signal: &'a mut [f32],
    /// Sum of (t − v)², where v is the value that t's code decodes to.
    pub noise: &'a mut [f32],
    /// Largest |t − v|.
    pub worst: &'a mut [f32],
}

/// The same of [`SUMMED`] blocks each, the last one's fewer, in units of the weights. Blocks with an absmax that isn't finite count
/// nowhere.
#[derive(Clone, Copy, Debug)]
pub struct ErrorSums<'a> {
    /// Sums of absmax² · signal, added in f64 in the blocks' order.
    pub signal: &'a [f64],
    /// Sums of absmax² · noise, likewise.
    pub noise: &'a [f64],
    /// Largest absmax · worst.
    pub worst: &'a [f64],
    /// Blocks with a signal of 0.
    pub zeros: &'a [u8],
}

/// Figures of a run of blocks.
pub enum Figures<'a> {
    /// Of each.
    Blocks(BlockErrors<'a>),
    /// Each one's absmax, and the sums of the others.
    Sums {
        /// The blocks' scales, as stored.
        absmax: &'a [f32],
        /// One for every [`SUMMED`] of them.
        errors: ErrorSums<'a>,
    },
}

impl Figures<'_> {
    /// The scale of each block, as decoding multiplies by it.
    pub fn absmax(&self) -> &[f32] {
        match self {
            Figures::Blocks(errors) => errors.absmax,
            Figures::Sums { absmax, .. } => absmax,
        }
    }
}
