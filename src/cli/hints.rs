//! Errors and warnings in words: the library's hints as the options that they stand for.

use prequant::{Error, Hint, Setting, Warning};

use super::escape;
use super::words::Limit;

/// An error, and what to do about it.
pub fn error(error: &Error) -> String {
    let message = match error {
        Error::Pattern { setting, pattern, why, .. } => format!("{} {pattern:?}: {why}", option(*setting)),
        Error::Options { setting, value, why, .. } => {
            format!("{}{} {why}", option(*setting), value.map(|value| format!(" {value}")).unwrap_or_default())
        }
        Error::Memory { limit, needed, .. } => too_small("--memory", *limit, *needed),
        Error::DeviceMemory { limit, needed } => too_small("--device-memory", *limit, *needed),
        Error::NoDevice { device, why } => format!("--device {device}: {why}"),
        other => other.to_string(),
    };
    with_hints(message, &error.hints())
}

/// An error as a terminal may show it. A pattern is the user's own, and the regex library points into it on several lines.
pub fn shown_error(failure: &Error) -> String {
    let message = error(failure);
    match failure {
        Error::Pattern { .. } => escape::lines(&message).into_owned(),
        _ => escape::line(&message).into_owned(),
    }
}

/// A warning as a terminal may show it.
pub fn shown_warning(given: &Warning) -> String {
    escape::line(&warning(given)).into_owned()
}

/// A warning, and what to do about it.
pub fn warning(warning: &Warning) -> String {
    with_hints(warning.message.clone(), warning.hint.as_slice())
}

fn too_small(option: &str, limit: u64, needed: u64) -> String {
    let limit = Limit(limit);
    format!("{option} {limit} is too small: this checkpoint needs at least {}", limit.at_least(needed))
}

/// `message; hint, or hint`.
fn with_hints(message: String, hints: &[Hint]) -> String {
    let hints: Vec<String> = hints.iter().map(|hint| advice(*hint)).collect();
    if hints.is_empty() { message } else { format!("{message}; {}", hints.join(", or ")) }
}

fn advice(hint: Hint) -> String {
    let advice = match hint {
        Hint::Exclude => "use --exclude to leave the tensor unquantized",
        Hint::Include => "use --include to choose tensors",
        Hint::IncludeDoubtful => "if they are Linears' after all, use --include; --dry-run lists the patterns",
        Hint::KeepExperts => "use --experts keep to leave experts unfused",
        Hint::SplitExperts => "use --experts keep to rewrite them as one tensor per expert",
        Hint::FuseExperts => "use --experts fuse to rewrite them as one tensor per projection",
        Hint::KeepNonFinite => "use --nonfinite keep to quantize it as bitsandbytes does",
        Hint::DequantizeSource => "use --dequantize-source to decode it while reading",
        Hint::RewriteScales => "use `prequant convert` with --format nvfp4 to copy its codes and rewrite its scales",
        Hint::GroupSize(size) => return format!("use --group-size {size}"),
        Hint::LargerBlocks => {
            "raise it, or use a larger --block-size: double quantization holds one f32 for every block of a tensor"
        }
        Hint::GptOssLayout => "use --format mxfp4 --layout gpt-oss",
        Hint::CompressedTensorsLayout => "use --layout compressed-tensors",
        Hint::Remove(setting) => return format!("remove {}", option(setting)),
        Hint::RemoveFor(format) => return format!("remove it for --format {format}"),
        Hint::ListTensors => "use --dry-run to see every tensor's name and decision",
        Hint::ListAllTensors => "use --dry-run without --only-experts to see every tensor",
        Hint::Replace => "choose another destination, or replace what is there with --force",
        Hint::ReplaceOther => {
            "keep it (`prequant verify --against` compares it with what this version makes), or use --force to replace it"
        }
        Hint::FollowLinks => "use --follow-links to copy what such links lead to",
        Hint::Resume => "run the same command again to resume",
        Hint::Restart => "use --restart to discard what an earlier run left",
        Hint::Verify => "use `prequant verify` to find all that is wrong with it",
        Hint::UseCpu => "use --device cpu; the output is the same",
    };
    advice.to_owned()
}

fn option(setting: Setting) -> &'static str {
    match setting {
        Setting::BlockSize => "--block-size",
        Setting::GroupSize => "--group-size",
        Setting::Layout => "--layout",
        Setting::DoubleQuant => "--double-quant",
        Setting::QuantStorage => "--quant-storage",
        Setting::Experts => "--experts",
        Setting::Include => "--include",
        Setting::Exclude => "--exclude",
        Setting::DequantizeSource => "--dequantize-source",
        Setting::NonFinite => "--nonfinite",
    }
}
