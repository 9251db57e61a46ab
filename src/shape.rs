//! Shapes of tensors, of which a checkpoint has few for its many tensors.

use std::collections::HashSet;
use std::sync::Arc;

/// Shapes that were met before, so that equal ones are one allocation.
#[derive(Debug, Default)]
pub(crate) struct Shapes(HashSet<Arc<[u64]>>);

impl Shapes {
    /// The shape with these dimensions.
    pub(crate) fn get(&mut self, dimensions: &[u64]) -> Arc<[u64]> {
        if let Some(known) = self.0.get(dimensions) {
            return known.clone();
        }
        let shape: Arc<[u64]> = dimensions.into();
        self.0.insert(shape.clone());
        shape
    }
}
