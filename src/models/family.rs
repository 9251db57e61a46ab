//! What a row of [`super::families`] can say of a family of architectures.

use crate::models::experts::ExpertParameter;
use crate::models::names::{NO_RENAMES, Renames};
use crate::models::roles::Role;

/// Where a family departs from what names and shapes tell by themselves.
#[derive(Debug)]
pub(crate) struct Family {
    /// config.json's `model_type`s that the row is for, of the model or of one nested in it.
    pub model_types: &'static [&'static str],
    /// The model's parameters for a layer's experts.
    pub experts: &'static [ExpertParameter],
    /// 2-D weights that are kept (or are Linears) against their looks; the first match decides.
    pub exceptions: &'static [Exception],
    /// How a tensor's module on disk is called in the loaded model.
    pub renames: Renames,
    /// Linears that clients merge under names of the family's own; see [`super::merged_linears`].
    pub merged_linears: &'static [&'static [&'static str]],
    /// Modules with no tensor on disk that must not become 4-bit: tied heads and other tied Linears. Each entry is spelled
    /// as `llm_int8_skip_modules` takes it: a regex that matches from the start of a module's name, or a suffix of it.
    /// Empty where the only one is `lm_head`.
    pub off_disk: &'static [&'static str],
    /// Whether its experts have an MXFP4 layout of their own (gpt-oss), the only one vLLM reads them in.
    pub gpt_oss_layout: bool,
}

/// The family that needs no row: what the rows leave out.
pub(crate) const PLAIN: Family = Family {
    model_types: &[],
    experts: &[],
    exceptions: &[],
    renames: NO_RENAMES,
    merged_linears: &[],
    off_disk: &[],
    gpt_oss_layout: false,
};

/// A part of a module's name, and what a 2-D weight with it in its name is.
#[derive(Debug)]
pub(crate) struct Exception {
    /// Looked for in `.module.name.`, so that dots stand for the borders of the parts; empty matches everything.
    pub part: &'static str,
    /// What the tensor is.
    pub role: Role,
    /// Whether it is kept; otherwise it is quantized.
    pub keep: bool,
    /// Whether the model makes an exact nn.Linear of it.
    pub linear: bool,
    /// A short sentence for people.
    pub reason: &'static str,
}

/// A Linear, or what its role says, that stays in its dtype.
pub(crate) const fn keep(part: &'static str, role: Role, reason: &'static str) -> Exception {
    Exception { part, role, keep: true, linear: true, reason }
}

/// A subclass of `nn.Linear`, which clients don't make 4-bit.
pub(crate) const fn not_exactly_linear(part: &'static str, reason: &'static str) -> Exception {
    Exception { part, role: Role::Linear, keep: true, linear: false, reason }
}

/// A Linear that looks like something else.
pub(crate) const fn quantize(part: &'static str, reason: &'static str) -> Exception {
    Exception { part, role: Role::Linear, keep: false, linear: true, reason }
}
