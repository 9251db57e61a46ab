"""What transformers makes of experts in compressed-tensors' layout, tensor by tensor.

    scripts/conformance experts [NAME]...    of ARCHITECTURES

Every architecture is converted to every format, and loaded by transformers alone with its weights decoded. Where `prequant convert`
puts nothing into config.json, each parameter must equal that of the model in which `prequant dequantize` decoded the same
checkpoint, or loading must fail by itself. Where it puts what stops transformers, loading must stop with it, also if shapes are to be
ignored; and without it the experts must be wrong, or it would stand in the way for nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
from transformers import CompressedTensorsConfig, PreTrainedModel

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "python" / "tests"))
import architectures  # noqa: E402

ARCHITECTURES = [
    "llama",
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "llama4",
    "granitemoe",
    "qwen3_vl_moe",
    "qwen3_vl_moe-hub",
    "qwen3_5_moe",
    "qwen3_5_moe-hub",
    "gemma4",
]
FORMATS = ["int4", "int4-asym", "mxfp4", "nvfp4"]
GUARD = "global_compression_ratio"

# Formats that transformers 5.23 stops at while it loads a layer's experts: it doesn't put zero points together.
STOPS_BY_ITSELF = ["int4-asym"]


def convert(prequant: str, source: Path, folder: Path, *flags: str) -> None:
    command = [prequant, "convert", source, folder, "--quiet", *flags]
    subprocess.run([str(word) for word in command], check=True)


def load(model_class: type[PreTrainedModel], folder: Path, **options: object) -> tuple[PreTrainedModel, dict]:
    return model_class.from_pretrained(folder, output_loading_info=True, dtype=torch.bfloat16, **options)


def one_by_one(parameters: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A parameter; of all experts, put together of modules that transformers gave each of them, as it gives llama4's."""
    if name in parameters:
        return parameters[name]
    container, _, kind = name.rpartition(".")
    kinds = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else [kind]
    count = len({key.removeprefix(f"{container}.").split(".")[0] for key in parameters if key.startswith(f"{container}.")})
    experts = [torch.cat([parameters[f"{container}.{i}.{part}.weight"] for part in kinds]).T for i in range(count)]
    return torch.stack(experts)


def differing(ours: PreTrainedModel, expected: PreTrainedModel) -> list[str]:
    """The parameters that aren't equal."""
    found = ours.state_dict()
    parameters = expected.named_parameters()
    return [name for name, parameter in parameters if not torch.equal(one_by_one(found, name), parameter)]


def check(prequant: str, work: Path, name: str, source: Path, model_class: type[PreTrainedModel], format: str) -> str:
    folder, decoded = work / "converted", work / "decoded"
    for path in (folder, decoded):
        shutil.rmtree(path, ignore_errors=True)
    flags = ["--format", format, *(["--group-size", "32"] if format.startswith("int4") else [])]
    convert(prequant, source, folder, *flags)
    subprocess.run([prequant, "dequantize", folder, decoded, "--quiet"], check=True)
    expected, info = load(model_class, decoded)
    assert not any(info.values()), f"decoded: {info}"

    decodes = {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    config = json.loads((folder / "config.json").read_text())
    guard = config["quantization_config"][GUARD]
    if guard is None:
        try:
            model, info = load(model_class, folder, **decodes)
        except RuntimeError as error:
            assert format in STOPS_BY_ITSELF, error
            return "stops by itself"
        assert not any(info.values()), info
        assert not differing(model, expected), differing(model, expected)[:4]
        return "every parameter is right"
    for options in ({}, {"ignore_mismatched_sizes": True}, {"experts_implementation": "eager"}, decodes):
        try:
            load(model_class, folder, **options)
        except ValueError as error:
            assert guard in str(error), error
        else:
            raise AssertionError(f"loaded in spite of {guard!r}, {options}")
    config["quantization_config"][GUARD] = None
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = load(model_class, folder, **decodes)
    assert differing(model, expected), f"{guard!r} stands in the way of nothing"
    return "stopped by config.json, and would be wrong"


def main(prequant: str, *names: str) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    work = ROOT / "target" / "loaded-experts"
    shutil.rmtree(work, ignore_errors=True)
    for name in names or ARCHITECTURES:
        model_class = architectures.SOURCES[name](work / name)
        for format in FORMATS:
            result = check(str(Path(prequant).resolve()), work, name, work / name, model_class, format)
            print(f"ok     {name}, {format}: {result}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
