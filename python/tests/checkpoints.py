"""Checkpoints for these tests and tests/conformance: made, loaded, read back byte by byte, and compared."""

from __future__ import annotations

import json
import struct
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path

import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def tensor(self) -> torch.Tensor:
        """The same as a torch tensor."""
        dtypes = {"U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
        return torch.frombuffer(bytearray(self.data), dtype=dtypes[self.dtype]).reshape(self.shape)


def save_random(model_class: type[PreTrainedModel], config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> None:
    """A checkpoint of a model whose every parameter is random, biases and norms included."""
    generator = torch.Generator().manual_seed(17)
    model = model_class(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.05
            parameter.copy_(noise + 1.0 if "norm" in name and parameter.dim() == 1 else noise)
    model.save_pretrained(folder)


def load(
    folder: Path, quantization: BitsAndBytesConfig | None = None, auto: type = AutoModelForCausalLM
) -> PreTrainedModel:
    """from_pretrained, insisting that the model takes each of its tensors from the file and leaves none there."""
    options = {"quantization_config": quantization} if quantization else {}
    model, info = auto.from_pretrained(folder, output_loading_info=True, **options)
    problems = {what: names for what, names in info.items() if names}
    assert not problems, f"{folder}: {problems}"
    return model


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of every safetensors file of a folder, straight from the bytes."""
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        content = path.read_bytes()
        (length,) = struct.unpack_from("<Q", content)
        header = json.loads(content[8 : 8 + length])
        assert header.pop("__metadata__") == {"format": "pt"}, path
        for name, entry in header.items():
            assert name not in found, f"{name} is stored twice"
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            found[name] = Stored(entry["dtype"], tuple(entry["shape"]), content[begin:end])
    return found


def compare_tensors(ours: dict[str, Stored], theirs: dict[str, Stored], fp4: Set[str] = frozenset()) -> None:
    """Same names, dtypes, shapes and bytes, but for which of its zeros FP4 has; `fp4` names codes without their quant_state."""
    assert ours.keys() == theirs.keys(), (
        f"only ours: {ours.keys() - theirs.keys()}, missing: {theirs.keys() - ours.keys()}"
    )
    for name, expected in theirs.items():
        found = ours[name]
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape), f"{name}: {found.dtype} {found.shape}"
        left, right = found.data, expected.data
        if f"{name}.{FP4_STATE}" in theirs or name in fp4:
            left, right = left.translate(ZERO_SIGNS), right.translate(ZERO_SIGNS)
        assert left == right, f"{name}: bytes differ"


FP4_STATE = "quant_state.bitsandbytes__fp4"
ZERO_SIGNS = bytes((high % 8 and high) << 4 | (low % 8 and low) for high in range(16) for low in range(16))
"""By packed FP4 codes: the same with code 8, which decodes to zero like code 0, made 0. Which of the two an element gets is
decided otherwise by bitsandbytes on a CPU than by its CUDA kernels, which prequant follows."""


def same_codes(ours: torch.Tensor, theirs: torch.Tensor, is_fp4: bool) -> bool:
    """Whether two tensors are equal; of FP4 codes, whether they decode to the same, -0.0 being 0.0."""
    if is_fp4:
        table = torch.frombuffer(bytearray(ZERO_SIGNS), dtype=torch.uint8)
        ours, theirs = (table[codes.view(torch.uint8).int()] for codes in (ours, theirs))
    return ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def quantized_names(tensors: dict[str, Stored]) -> list[str]:
    """The weights that are stored in 4 bits, by their names before quantization."""
    return sorted(name.removesuffix(".quant_map") for name in tensors if name.endswith(".quant_map"))


def quant_state(tensors: dict[str, Stored], name: str) -> functional.QuantState:
    """A weight's quant_state as bitsandbytes reads it."""
    parts = {
        key.removeprefix(f"{name}."): stored.tensor() for key, stored in tensors.items() if key.startswith(f"{name}.")
    }
    return functional.QuantState.from_dict(parts, torch.device("cpu"))


def quant_state_json(tensors: dict[str, Stored], name: str, quant_type: str) -> dict:
    """The JSON part of a weight's quant_state."""
    return json.loads(tensors[f"{name}.quant_state.bitsandbytes__{quant_type}"].data)


def restored_absmax(state: functional.QuantState) -> torch.Tensor:
    """absmax as decoding sees it: f32, whether it was quantized or not."""
    if not state.nested:
        return state.absmax
    return functional.dequantize_blockwise(state.absmax, state.state2) + state.offset


def compare_models(ours: PreTrainedModel, theirs: PreTrainedModel) -> None:
    """Same state dict, then same logits, bit for bit.

    The state dicts come first: with AVX512-bf16 a Linear4bit repacks its weight at the first forward in eval mode.
    """
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    for name, tensor in right.items():
        assert same_codes(left[name], tensor, f"{name}.{FP4_STATE}" in right), f"{name} differs in memory"
    for training in modes(theirs):
        assert torch.equal(logits(ours, training), logits(theirs, training)), f"logits differ, training={training}"


def modes(model: PreTrainedModel) -> tuple[bool, ...]:
    """Training mode, which takes any shape, and eval mode where bitsandbytes' kernel for AVX512-bf16 takes the model's.

    That kernel insists on rows of whole blocks.
    """
    linears = [module for module in model.modules() if isinstance(module, Linear4bit)]
    whole = all(module.in_features % module.weight.quant_state.blocksize == 0 for module in linears)
    return (True, False) if whole else (True,)


def logits(model: PreTrainedModel, training: bool) -> torch.Tensor:
    """Logits of two fixed sequences. The configs have no dropout, so that training mode gives the same twice."""
    tokens = torch.randint(0, model.config.vocab_size, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.train(training)(tokens).logits


def check_config(source: Path, converted: Path, quant_type: str, double_quant: bool, model: PreTrainedModel) -> None:
    """config.json is the source's with quantization_config added, and its skip list names the Linears left alone.

    """
    config = json.loads((converted / "config.json").read_text())
    quantization = config.pop("quantization_config")
    assert config == json.loads((source / "config.json").read_text()), "config.json changed elsewhere"
    skipped = quantization.pop("llm_int8_skip_modules")
    compute_dtype = quantization.pop("bnb_4bit_compute_dtype")
    assert quantization == {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": quant_type,
        "bnb_4bit_use_double_quant": double_quant,
        "bnb_4bit_quant_storage": "uint8",
    }, quantization
    assert compute_dtype in (config.get("dtype") or config.get("torch_dtype"), "bfloat16"), compute_dtype

    linears = {name: module for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    kept = {name for name, module in linears.items() if not isinstance(module, Linear4bit)}
    assert kept <= set(skipped), f"not in llm_int8_skip_modules: {kept - set(skipped)}"
    for name in linears.keys() - kept:
        assert should_convert_module(name, skipped), f"llm_int8_skip_modules matches {name}, which is quantized"


def on_load(converted: Path) -> BitsAndBytesConfig:
    """What a user asks for to get on loading what `converted` holds; the skip list is the model's own, not ours."""
    quantization = json.loads((converted / "config.json").read_text())["quantization_config"]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization["bnb_4bit_quant_type"],
        bnb_4bit_use_double_quant=quantization["bnb_4bit_use_double_quant"],
        bnb_4bit_compute_dtype=getattr(torch, quantization["bnb_4bit_compute_dtype"]),
    )
