//! Which files beside the weights aren't part of the model: the same weights in other formats, what training left, what belongs to
//! git or the hub. Whatever no rule here names is part of it, weights in any format among them: speaker dictionaries, vocoders,
//! adapters, further models in folders of their own.

use super::weight_files::{DIFFUSERS, INDEX_END, SAFETENSORS, Shard, TRANSFORMERS};
use super::{MANIFEST_NAME, QUANT_CONFIG_NAME, SUMS_NAME};

const SAME_WEIGHTS: &str = "the same weights in another format";
const OF_TRAINING: &str = "the state of a training run";
const UNFINISHED: &str = "an unfinished download";
const OF_LLAMA_CPP: &str = "weights in llama.cpp's format";
const OF_GIT_OR_HUB: &str = "hidden: a file of git, the hub or an editor";
const OF_CONVERSION: &str = "of an earlier conversion, not of the model";
const OF_SOURCE_QUANTIZATION: &str = "says how the source's weights are quantized, not those that are written";

/// Names of files that say how weights beside them are quantized.
const QUANTIZATION_CONFIGS: &[&str] = &[QUANT_CONFIG_NAME, "quantize_config.json", "quant_config.json"];

/// How files that hold all of a model's weights are called, before their endings.
const WHOLE_MODELS: &[&str] = &[
    TRANSFORMERS.stem,
    DIFFUSERS.stem,
    "pytorch_model",
    "tf_model",
    "flax_model",
    "rust_model",
    "diffusion_flax_model",
    "consolidated",
    "openvino_model",
    "decoder_model",
    "decoder_with_past_model",
    "encoder_model",
];

/// Endings of files of weights.
const WEIGHT_ENDS: &[&str] = &[
    SAFETENSORS,
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".ot",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".npz",
    ".xml",
    ".mlmodel",
];

/// Endings of weights that only other frameworks read.
const OTHER_FRAMEWORKS: &[&str] = &[".h5", ".msgpack", ".ot", ".tflite", ".mlmodel"];

/// Folders of a repository that hold its weights in another format.
const FORMAT_FOLDERS: &[&str] = &["onnx", "openvino", "coreml", "original", "metal", "tflite", "gguf", "flax", "tf"];

/// Names of files that a trainer writes beside a checkpoint, before their endings.
const TRAINERS: &[&str] = &["optimizer", "scheduler", "scaler", "rng_state", "random_states", "training_args"];

/// Why a file at this path below the source isn't copied; none if it is. Source files and what is written anew aside.
pub(crate) fn why_left_out(path: &str) -> Option<&'static str> {
    let (folder, name) = path.rsplit_once('/').map_or((None, path), |(folder, name)| (Some(folder), name));
    if name.starts_with('.') {
        return Some(OF_GIT_OR_HUB);
    }
    if [".incomplete", ".crdownload", ".part", ".aria2"].iter().any(|end| name.ends_with(end)) {
        return Some(UNFINISHED);
    }
    if name.ends_with(".gguf") || name.contains("ggml") && name.ends_with(".bin") || name.ends_with(".ggml") {
        return Some(OF_LLAMA_CPP);
    }
    if is_of_trainer(name) {
        return Some(OF_TRAINING);
    }
    let top = folder.map(|folder| folder.split('/').next().unwrap_or(folder));
    match top {
        None => why_left_out_of_root(name),
        Some(top) if FORMAT_FOLDERS.contains(&top) && is_weights(name) => Some(SAME_WEIGHTS),
        Some(_) => None,
    }
}

/// The same of a folder, all of which is left out.
pub(crate) fn why_folder_left_out(path: &str) -> Option<&'static str> {
    let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
    let numbered = |begin: &str| name.strip_prefix(begin).is_some_and(is_digits);
    match name {
        _ if name.starts_with('.') => Some(OF_GIT_OR_HUB),
        "__pycache__" => Some("compiled code of Python's"),
        "wandb" | "runs" => Some(OF_TRAINING),
        _ if numbered("checkpoint-") || numbered("global_step") || numbered("step_") => Some(OF_TRAINING),
        _ => None,
    }
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

fn is_of_trainer(name: &str) -> bool {
    let is_state = [".pt", ".pth", ".bin", ".pkl"].iter().any(|end| name.ends_with(end));
    (is_state && TRAINERS.iter().any(|stem| is_named(name, stem)))
        || name.starts_with("events.out.tfevents")
        || name.ends_with("_model_states.pt")
        || name.ends_with("_optim_states.pt")
        || name.ends_with(".distcp")
}

fn why_left_out_of_root(name: &str) -> Option<&'static str> {
    match name {
        MANIFEST_NAME | SUMS_NAME => return Some(OF_CONVERSION),
        _ if QUANTIZATION_CONFIGS.contains(&name) => return Some(OF_SOURCE_QUANTIZATION),
        _ => {}
    }
    let is_whole = is_whole_model(name);
    let is_other = OTHER_FRAMEWORKS.iter().any(|end| name.ends_with(end));
    match name {
        _ if is_whole && name.ends_with(SAFETENSORS) => Some("another set of the model's weights"),
        _ if is_whole && name.ends_with(INDEX_END) => Some("the index of files that the output doesn't have"),
        _ if is_whole || is_other => Some(SAME_WEIGHTS),
        _ => None,
    }
}

/// Whether a file at this path below a checkpoint's folder is called like one of all the model's weights, or their index: clients
/// look for these.
pub(crate) fn is_whole_model(path: &str) -> bool {
    let is_weights = is_weights(path) || path.ends_with(".index.json");
    !path.contains('/') && is_weights && WHOLE_MODELS.iter().any(|stem| is_named(path, stem))
}

fn is_weights(name: &str) -> bool {
    WEIGHT_ENDS.iter().any(|end| name.ends_with(end))
}

/// Whether a file is called `stem`, or that with a shard's number or a variant (`model.fp16`, `model-00001-of-00002`).
fn is_named(name: &str, stem: &str) -> bool {
    if let Some(shard) = Shard::of(name) {
        return shard.stem == stem || shard.stem.strip_prefix(stem).is_some_and(|rest| rest.starts_with('.'));
    }
    let Some(rest) = name.strip_prefix(stem) else { return false };
    let numbered = rest.strip_prefix(['-', '_']).is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()));
    rest.starts_with('.') || numbered
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_a_model_are_copied_in_any_format() {
        for path in [
            "spk_dict.pt",
            "speakers.npz",
            "campplus.onnx",
            "voices.bin",
            "adapter_model.safetensors",
            "mtp.safetensors",
            "model_extra.safetensors",
            "vae.ckpt",
            "token2wav/flow.pt",
            "whisper-large-v3/model.safetensors",
            "2_Dense/pytorch_model.bin",
            "original/params.json",
            "onnx/config.json",
            "trainer_state.json",
            "optimizer.py",
            "models.py",
            "modeling.py",
        ] {
            assert_eq!(why_left_out(path), None, "{path}");
        }
    }

    #[test]
    fn the_same_weights_in_other_formats_and_states_of_training_are_left_out() {
        for (path, why) in [
            ("pytorch_model.bin", SAME_WEIGHTS),
            ("pytorch_model-00001-of-00002.bin", SAME_WEIGHTS),
            ("pytorch_model.bin.index.json", SAME_WEIGHTS),
            ("tf_model.h5", SAME_WEIGHTS),
            ("flax_model.msgpack", SAME_WEIGHTS),
            ("consolidated.00.pth", SAME_WEIGHTS),
            ("original/consolidated.00.pth", SAME_WEIGHTS),
            ("onnx/model.onnx", SAME_WEIGHTS),
            ("metal/model.bin", SAME_WEIGHTS),
            ("model.fp16.safetensors", "another set of the model's weights"),
            ("model-00001-of-00002.safetensors", "another set of the model's weights"),
            ("model.fp16-00001-of-00002.safetensors", "another set of the model's weights"),
            ("consolidated.safetensors", "another set of the model's weights"),
            ("x-Q4_K_M.gguf", OF_LLAMA_CPP),
            ("sub/x.gguf", OF_LLAMA_CPP),
            ("optimizer.pt", OF_TRAINING),
            ("rng_state_0.pth", OF_TRAINING),
            ("training_args.bin", OF_TRAINING),
            (".gitattributes", OF_GIT_OR_HUB),
            ("model-00001.safetensors.incomplete", UNFINISHED),
            ("prequant.json", OF_CONVERSION),
            ("quantize_config.json", OF_SOURCE_QUANTIZATION),
        ] {
            assert_eq!(why_left_out(path), Some(why), "{path}");
        }
        for folder in [".git", ".cache", "checkpoint-500", "global_step500", "a/__pycache__"] {
            assert!(why_folder_left_out(folder).is_some(), "{folder}");
        }
        for folder in ["checkpoint", "checkpoint-best", "1_Pooling", "token2wav", "a/b"] {
            assert!(why_folder_left_out(folder).is_none(), "{folder}");
        }
    }
}
