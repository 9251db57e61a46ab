//! What formats with groups ask of a weight: whole groups in every row.

use std::borrow::Cow;

use super::input::{Input, MAX_EXPERTS};
use super::split;
use crate::checkpoint::Source;
use crate::error::{Error, Result};
use crate::format::{Codec, Layout};
use crate::models::{Role, Verdict};

/// Keeps a weight that the format can't hold: its rows aren't whole groups, or the layout is for others.
///
/// # Errors
/// When gpt-oss's layout can't be had of all experts.
pub fn check(source: &Source, model_types: &[&str], input: &Input, codec: &Codec, verdict: &mut Verdict) -> Result<()> {
    let keep = |verdict: &mut Verdict, reason: Cow<'static, str>| {
        (verdict.quantize, verdict.reason) = (false, reason);
        Ok(())
    };
    if codec.layout() == Some(Layout::GptOss) {
        return match verdict.role {
            Role::FusedExperts => check_gpt_oss(source, input, codec, verdict),
            _ if verdict.quantize => keep(verdict, "gpt-oss's layout is of experts only: kept in its dtype".into()),
            _ => Ok(()),
        };
    }
    if !verdict.quantize {
        return Ok(());
    }
    let columns = match verdict.role {
        Role::FusedExperts => split::columns(source, model_types, input)?,
        _ if input.shape.len() != 2 => {
            return keep(verdict, "it isn't a matrix, as what has groups must be: kept in its dtype".into());
        }
        _ if !input.name.ends_with(".weight") => {
            return keep(verdict, "its name doesn't end in .weight, as that of what has groups must: kept".into());
        }
        _ => input.shape[1],
    };
    let group = codec.block_len(columns);
    if codec.packed_row(columns) > 2 * columns {
        return keep(verdict, "its rows would take more room than in 16 bits: kept in its dtype".into());
    }
    if columns.is_multiple_of(group) {
        return Ok(());
    }
    keep(verdict, format!("its {columns} columns aren't whole groups of {group}: kept in its dtype").into())
}

/// Its loader takes all experts for MXFP4.
fn check_gpt_oss(source: &Source, input: &Input, codec: &Codec, verdict: &Verdict) -> Result<()> {
    let error = |why: String| {
        let path = source.files[input.read.first_file()].location.path().to_owned();
        Err(Error::Experts { path, tensor: input.name.clone(), why })
    };
    if !verdict.quantize {
        return error(format!("{}: in gpt-oss's layout all experts are quantized, or none", verdict.reason));
    }
    match input.shape[..] {
        [experts, columns, _] if columns.is_multiple_of(codec.block_len(columns)) && experts <= MAX_EXPERTS => Ok(()),
        _ => error(format!("its shape is {:?}: the second dimension must be whole groups of 32", input.shape)),
    }
}
