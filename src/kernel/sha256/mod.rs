//! SHA-256 of streams.
use sha2::{Digest, Sha256};

/// One stream.
#[derive(Clone, Default)]
pub(crate) struct Sha256Stream(Sha256);

impl Sha256Stream {
    /// Nothing hashed yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }
    /// Takes `bytes`.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }
    /// The hash.
    pub(crate) fn finish(self) -> [u8; 32] {
        self.0.finalize().into()
    }
}

/// Both take the same bytes.
pub(crate) fn update_pair(a: &mut Sha256Stream, b: &mut Sha256Stream, bytes: &[u8]) {
    a.update(bytes);
    b.update(bytes);
}
