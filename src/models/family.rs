//! What a row of [`super::families`] can say of a family of architectures.

use crate::models::experts::ExpertParameter;

/// What a family has that neither names and shapes nor `super::facts` tell.
#[derive(Debug)]
pub(crate) struct Family {
    /// config.json's `model_type`s that the row is for, of the model or of one nested in it.
    pub model_types: &'static [&'static str],
    /// The model's parameters for a layer's experts.
    pub experts: &'static [ExpertParameter],
    /// Linears that clients merge under names of the family's own; see [`super::merged_linears`].
    pub merged_linears: &'static [&'static [&'static str]],
    /// Whether its experts have an MXFP4 layout of their own (gpt-oss), the only one vLLM reads them in.
    pub gpt_oss_layout: bool,
    /// Whether transformers gives a quantized model a module for each expert, where the model itself has them in one parameter
    /// (`MODULES_TO_PATCH_FOR_QUANTIZATION` in quantizers/base.py).
    pub single_when_quantized: bool,
}

/// The family that needs no row: what the rows leave out.
pub(crate) const PLAIN: Family =
    Family { model_types: &[], experts: &[], merged_linears: &[], gpt_oss_layout: false, single_when_quantized: false };
