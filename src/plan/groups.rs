//! What formats with groups require of a weight.

use std::borrow::Cow;

use super::split;
use crate::checkpoint::Source;
use crate::error::{Error, Hint, Result};
use crate::format::{Codec, Layout};
use crate::models::{Role, Verdict};
use crate::read::{Input, MAX_EXPERTS};

/// Why a weight can't be cut into groups, after the number of its columns and before that of a group's.
pub(super) const NO_GROUPS: &str = "aren't a multiple of group size";

/// Keeps a weight that the format can't hold: its columns aren't a multiple of the group size, or its layout is for others.
///
/// # Errors
/// When the layout is gpt-oss's and not all experts fit it.
pub(crate) fn check(
    source: &Source,
    model_types: &[&str],
    input: &Input,
    codec: &Codec,
    verdict: &mut Verdict,
) -> Result<()> {
    let keep = |verdict: &mut Verdict, reason: Cow<'static, str>| {
        (verdict.quantize, verdict.reason) = (false, reason);
        Ok(())
    };
    if codec.layout() == Some(Layout::GptOss) {
        return match verdict.role {
            Role::FusedExperts => check_gpt_oss(source, input, codec, verdict),
            _ if verdict.quantize => keep(verdict, "the gpt-oss layout holds experts only: kept in its dtype".into()),
            _ => Ok(()),
        };
    }
    if !verdict.quantize {
        return Ok(());
    }
    let columns = match verdict.role {
        Role::FusedExperts if is_shared(&input.name) && !split::is_known(model_types, &input.name) => {
            return keep(
                verdict,
                "shared experts in one parameter, which no client has one by one: kept in its dtype".into(),
            );
        }
        Role::FusedExperts => split::columns(source, model_types, input)?,
        _ if input.shape.len() != 2 => {
            return keep(verdict, "not 2-D, as formats with groups require: kept in its dtype".into());
        }
        _ if !input.name.ends_with(".weight") => {
            return keep(
                verdict,
                "name doesn't end in .weight, as formats with groups require: kept in its dtype".into(),
            );
        }
        _ => input.shape[1],
    };
    let group = codec.block_len(columns);
    if codec.packed_row(columns) > 2 * columns {
        return keep(verdict, "would be larger than in 16 bits: kept in its dtype".into());
    }
    if columns.is_multiple_of(group) {
        return Ok(());
    }
    keep(verdict, format!("{columns} columns {NO_GROUPS} {group}: kept in its dtype").into())
}

/// Whether experts that every token goes through: a few, beside many that are chosen from.
fn is_shared(tensor: &str) -> bool {
    tensor.split('.').any(|part| part.starts_with("shared_expert"))
}

/// gpt-oss's loader takes every expert to be MXFP4.
fn check_gpt_oss(source: &Source, input: &Input, codec: &Codec, verdict: &Verdict) -> Result<()> {
    let error = |why: String| {
        let path = source.files[input.read.first_file()].location.path().to_owned();
        Err(Error::Experts { path, tensor: input.name.to_string(), why, hint: Some(Hint::CompressedTensorsLayout) })
    };
    if !verdict.quantize {
        return error(format!("{}; the gpt-oss layout needs all experts quantized", verdict.reason));
    }
    match input.shape[..] {
        [experts, columns, _] if columns.is_multiple_of(codec.block_len(columns)) && experts <= MAX_EXPERTS => Ok(()),
        _ => error(format!("its shape is {:?}: the second dimension must be a multiple of 32", input.shape)),
    }
}
