//! Finding a checkpoint's tensors by name.

use std::collections::HashMap;

use super::Span;
use crate::checkpoint::{Source, TensorInfo};

/// All tensors of a checkpoint by name: where their bytes are, and what headers say of them.
#[derive(Debug)]
pub(crate) struct Tensors<'a>(HashMap<&'a str, (Span, &'a TensorInfo)>);

impl<'a> Tensors<'a> {
    /// Those of an opened checkpoint.
    pub(crate) fn new(source: &'a Source) -> Tensors<'a> {
        let in_file = |(file, tensors): (usize, &'a [TensorInfo])| {
            let each = tensors.iter().enumerate();
            each.map(move |(tensor, info)| {
                let TensorInfo { offset, len, .. } = *info;
                (&*info.name, (Span { file, tensor, offset, len }, info))
            })
        };
        Tensors(source.files.iter().map(|file| &*file.tensors).enumerate().flat_map(in_file).collect())
    }

    /// The one with this name.
    pub(crate) fn get(&self, name: &str) -> Option<(Span, &'a TensorInfo)> {
        self.0.get(name).copied()
    }

    /// All names.
    pub(crate) fn names(&self) -> impl Iterator<Item = &'a str> {
        self.0.keys().copied()
    }
}
