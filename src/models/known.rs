//! What is done with a tensor of which transformers' own code says what it is.
//!
//! An exact `nn.Linear` is quantized, as `load_in_4bit` does, but for those that are small and decide much: routers,
//! shared experts' gates, classification heads, patch embeddings.

use crate::models::facts::{Facts, Kind};
use crate::models::roles::{ModuleName, Role};

/// What is done with a tensor, and why: the parts of a verdict.
pub(super) struct Known {
    pub(super) role: Role,
    pub(super) quantize: bool,
    /// Whether the model makes an `nn.Linear` or `Conv1D` of it.
    pub(super) linear: bool,
    pub(super) reason: &'static str,
}

const SPLIT: &str =
    "its rows are put in other places when the model is loaded, which a 4-bit tensor can't be: kept in its dtype";
const CONV1D: &str =
    "Conv1D stores [in, out], 4-bit modules [out, in], and prequant doesn't transpose it: kept in its dtype";
const SUBCLASS: &str =
    "of a subclass of nn.Linear: transformers makes 4-bit modules of nn.Linear itself only; kept in its dtype";
const FP32: &str = "transformers keeps it in f32 (_keep_in_fp32_modules) and never makes it 4-bit";
const LAST: &str = "the model's last parameter, which transformers doesn't make 4-bit by default";
const TIED: &str = "tied to another module's weight: transformers doesn't make it 4-bit by default";

/// The decision on a tensor that the facts name; none where names and shapes decide.
pub(super) fn known(facts: &Facts, tensor: &str, shape: &[u64]) -> Option<Known> {
    let kinds = facts.kinds(tensor, shape.len());
    // Where layers differ, what holds for the one that is kept is done to all.
    let kind = *kinds.iter().find(|kind| !is_quantized(**kind)).or(kinds.first())?;
    let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
    let mut known = of_kind(kind, &ModuleName::new(module), shape)?;
    known.linear |= kinds.iter().any(|kind| is_linear(*kind));
    Some(known)
}

fn is_quantized(kind: Kind) -> bool {
    matches!(kind, Kind::Linear | Kind::Experts)
}

/// Whether clients that quantize would make a 4-bit module of its owner.
fn is_linear(kind: Kind) -> bool {
    use Kind::{Conv1d, Cut, Fp32, Head, InRouter, Labels, Last, Linear, Tied};
    matches!(kind, Linear | Cut | Fp32 | Head | Labels | Last | Tied | InRouter | Conv1d)
}

fn of_kind(kind: Kind, name: &ModuleName, shape: &[u64]) -> Option<Known> {
    let keep = |role, reason| Some(Known { role, quantize: false, linear: is_linear(kind), reason });
    match kind {
        Kind::Linear => Some(linear(name)),
        Kind::Cut => keep(Role::Linear, SPLIT),
        Kind::Fp32 => keep(Role::Linear, FP32),
        Kind::Tied if name.is_output_head() || name.has("lm_head") => {
            keep(Role::OutputHead, "output head: kept in its dtype")
        }
        Kind::Head | Kind::Labels => keep(Role::OutputHead, "output head: kept in its dtype"),
        Kind::Last => keep(Role::OutputHead, LAST),
        Kind::Tied => keep(Role::Linear, TIED),
        Kind::InRouter | Kind::Router => keep(Role::Router, "router: decides which experts run, kept in its dtype"),
        Kind::Conv1d => keep(Role::Conv1d, CONV1D),
        Kind::Subclass => keep(Role::Linear, SUBCLASS),
        Kind::Embedding => keep(Role::Embedding, "embedding: kept in its dtype"),
        Kind::Experts => {
            let (role, reason) = match shape.len() {
                2 => (Role::ExpertLinear, "one expert's matrix"),
                _ => (Role::FusedExperts, "3-D weight of all experts in the layer"),
            };
            Some(Known { role, quantize: true, linear: false, reason })
        }
        Kind::Parameter if name.is_norm() => None,
        Kind::Parameter | Kind::Buffer => {
            keep(Role::Buffer, "parameter or buffer, not the weight of a Linear: kept in its dtype")
        }
        // Told by their names, and always kept.
        Kind::Convolution if shape.len() == 3 && !name.is_patch_embedding() => {
            keep(Role::Convolution, "convolution: kept in its dtype")
        }
        Kind::Convolution | Kind::Bias => None,
    }
}

/// An exact `nn.Linear`.
fn linear(name: &ModuleName) -> Known {
    let (role, reason) = if name.is_shared_expert_gate() {
        (Role::SharedExpertGate, "shared expert gate: too small to be worth it, kept in its dtype")
    } else if name.is_router() {
        (Role::Router, "router: decides which experts run, kept in its dtype")
    } else if name.is_patch_embedding() {
        (Role::PatchEmbedding, "patch embedding: kept in its dtype")
    } else if name.is_output_head() {
        (Role::OutputHead, "output head: kept in its dtype")
    } else {
        return Known { role: Role::Linear, quantize: true, linear: true, reason: "2-D weight of a Linear" };
    };
    Known { role, quantize: false, linear: true, reason }
}
