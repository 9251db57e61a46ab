"""What a file of a checkpoint is to the programs that load it, told by its path.

What isn't known to be for people is taken to be loaded. The same table as in prequant's `src/checkpoint/file_class.rs`;
`tests/data/file_classes.json` is tried on both.
"""

from __future__ import annotations

import re

FOLDERS = {
    ".prequant-staging",
    ".prequant-done",
    ".git",
    ".github",
    ".cache",
    ".huggingface",
    ".ipynb_checkpoints",
    ".idea",
    ".vscode",
}
"""Folders of git, the hub, editors and unfinished conversions: nothing in them belongs to a checkpoint."""

LEFT_BEHIND = {
    ".gitattributes",
    ".gitignore",
    ".gitmodules",
    ".gitkeep",
    ".lfsconfig",
    ".git",
    ".ds_store",
    "thumbs.db",
    "desktop.ini",
}

DOCUMENTS = set(
    "md markdown mdx rst adoc pdf html htm tex bib cff log "
    "png jpg jpeg gif svg webp bmp ico tif tiff avif heic mp4 mov webm".split()
)

TEXTS = re.compile(
    r"(licen[sc]es?|notices?|copying|copyright|patents|eula|terms|use_policy|acceptable_use_policy|disclaimer"
    r"|third_party_notices|readme|changelog|changes|history|release_notes|notes|todo|authors|contributors|contributing"
    r"|citation|acknowledgements)([-_ ][^.]*)?"
)
"""Names of plain texts, `.txt` or without a format. Other `.txt` files may be vocabularies, merges or prompts."""


def is_loaded(path: str) -> bool:
    """Whether clients load the file at this path below a checkpoint, or could take it for one that they should."""
    *folders, name = path.lower().split("/")
    stem, dot, form = name.rpartition(".")
    return not (
        not FOLDERS.isdisjoint(folders)
        or name in LEFT_BEHIND
        or (dot and stem and form in DOCUMENTS)
        or TEXTS.fullmatch(name.removesuffix(".txt"))
    )


_WHOLE_MODELS = (
    "model",
    "diffusion_pytorch_model",
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
)
"""How files that hold all of a model's weights are called, before their endings."""

_WEIGHT_ENDS = (
    ".safetensors",
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
    ".index.json",
)
_NUMBERED = re.compile(r"(?P<stem>.*?)[-_.][0-9]+(-of-[0-9]+)?\.safetensors", re.ASCII | re.DOTALL)


def is_whole_model(path: str) -> bool:
    """Whether a file at this path below a checkpoint's folder is called like one of all the model's weights, or their index. The
    same rule as in prequant's `src/checkpoint/parts.rs`."""
    if "/" in path or not path.endswith(_WEIGHT_ENDS):
        return False
    if numbered := _NUMBERED.fullmatch(path):
        stem = numbered["stem"]
        return any(stem == name or stem.startswith(f"{name}.") for name in _WHOLE_MODELS)
    rests = [path.removeprefix(name) for name in _WHOLE_MODELS if path.startswith(name)]
    return any(rest.startswith(".") or re.match(r"[-_][0-9]", rest, re.ASCII) for rest in rests)
