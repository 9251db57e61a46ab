"""Checkpoints that aren't what they say: each is an error that names the file, the tensor and the way out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Sources, convert
from damage import Tensors, edit_config, edit_state, remove, rewrite
from transformers import AutoModelForCausalLM

from prequant_loader import PrequantError
from prequant_loader.layout import read_header

LAYER = "model.layers.0.mlp.experts"
SINGLE = f"{LAYER}.1.up_proj.weight"
FUSED = f"{LAYER}.gate_up_proj"
LINEAR = "model.layers.0.self_attn.q_proj.weight"

KEEP = ("--experts", "keep")
FUSE = ("--experts", "fuse")
DOUBLE = ("--experts", "fuse", "--double-quant")


def fails(folder: Path, *words: str) -> None:
    """Insists that loading raises an error of ours with these words in it, the file's name and what to do among them."""
    with pytest.raises(PrequantError) as raised:
        AutoModelForCausalLM.from_pretrained(folder)
    message = str(raised.value)
    assert str(folder) in message and "expected" in message, message
    assert re.search(r"convert it again|convert with|load it with|name .* in|remove it", message), message
    missing = [word for word in words if word not in message]
    assert not missing, f"{missing} not in: {message}"


@pytest.mark.parametrize(
    ("flags", "tensor", "part"),
    [
        (KEEP, SINGLE, "absmax"),
        (KEEP, SINGLE, "quant_map"),
        (KEEP, SINGLE, "quant_state.bitsandbytes__nf4"),
        (FUSE, FUSED, "absmax"),
        (FUSE, FUSED, "quant_map"),
        (FUSE, FUSED, "quant_state.bitsandbytes__nf4"),
        (DOUBLE, FUSED, "nested_absmax"),
        (DOUBLE, FUSED, "nested_quant_map"),
        (KEEP, LINEAR, "absmax"),
        (KEEP, LINEAR, "quant_state.bitsandbytes__nf4"),
    ],
)
def test_a_missing_statistic(
    editable: Callable[..., Path], flags: tuple[str, ...], tensor: str, part: str
) -> None:
    folder = editable("qwen3_moe", *flags)
    rewrite(folder, lambda tensors: remove(tensors, f"{tensor}.{part}"))
    fails(folder, tensor, "missing")


@pytest.mark.parametrize(("flags", "tensor"), [(KEEP, SINGLE), (FUSE, FUSED), (KEEP, LINEAR)])
def test_all_statistics_missing(editable: Callable[..., Path], flags: tuple[str, ...], tensor: str) -> None:
    folder = editable("qwen3_moe", *flags)
    rewrite(folder, lambda tensors: remove(tensors, f"{tensor}."))
    fails(folder, tensor, "without any statistics")


@pytest.mark.parametrize(("flags", "tensor"), [(KEEP, SINGLE), (FUSE, FUSED)])
def test_a_statistic_without_codes(editable: Callable[..., Path], flags: tuple[str, ...], tensor: str) -> None:
    folder = editable("qwen3_moe", *flags)
    rewrite(folder, lambda tensors: tensors.__delitem__(tensor))
    fails(folder, tensor, "without the codes")


def test_a_statistic_of_another_size(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *FUSE)

    def shorten(tensors: Tensors) -> None:
        tensors[f"{FUSED}.absmax"] = tensors[f"{FUSED}.absmax"][:-1].clone()

    rewrite(folder, shorten)
    fails(folder, f"{FUSED}.absmax", "F32 [2047]", "F32 [2048]")


def test_codes_of_another_size(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *FUSE)
    rewrite(folder, lambda tensors: tensors.update({FUSED: tensors[FUSED][:-1].clone()}))
    fails(folder, FUSED, "two per byte")


def test_a_damaged_quant_state(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *FUSE)
    state = f"{FUSED}.quant_state.bitsandbytes__nf4"
    rewrite(folder, lambda tensors: tensors.update({state: torch.zeros(9, dtype=torch.uint8)}))
    fails(folder, state, "can't be read")


@pytest.mark.parametrize(
    ("flags", "tensor", "shape", "found"),
    [
        (FUSE, f"{LAYER}.down_proj", [4, 64, 128], "rows and columns are exchanged"),
        (KEEP, SINGLE, [128, 64], "rows and columns are exchanged"),
        (KEEP, f"{LAYER}.1.down_proj.weight", [64, 128], "rows and columns are exchanged"),
        (FUSE, f"{LAYER}.down_proj", [2, 128, 128], "its shape is [2, 128, 128]"),
        (KEEP, "model.layers.0.self_attn.k_proj.weight", [128, 64], "rows and columns are exchanged"),
    ],
)
def test_a_transposed_or_other_shape(
    editable: Callable[..., Path], flags: tuple[str, ...], tensor: str, shape: list[int], found: str
) -> None:
    folder = editable("qwen3_moe", *flags)
    rewrite(folder, lambda tensors: edit_state(tensors, tensor, shape=shape))
    fails(folder, tensor, found)


def test_an_expert_missing(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *KEEP)
    rewrite(folder, lambda tensors: remove(tensors, f"{LAYER}.2.gate_proj.weight"))
    fails(folder, "gate_proj", "not for expert 2")


def test_an_expert_missing_that_transformers_would_not_miss(editable: Callable[..., Path]) -> None:
    """One whose other matrices are there: the parameter would be made of fewer rows."""
    folder = editable("mixtral", *KEEP)
    rewrite(folder, lambda tensors: remove(tensors, "model.layers.1.block_sparse_moe.experts.3.w2."))
    fails(folder, "experts.", "not for expert 3")


def test_fewer_experts_than_the_model_has(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *KEEP)
    rewrite(folder, lambda tensors: remove(tensors, f"{LAYER}.3."))
    fails(folder, LAYER, "3 experts")


def test_one_expert_in_bf16(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *KEEP)

    def restore(tensors: Tensors) -> None:
        remove(tensors, f"{SINGLE}.")
        tensors[SINGLE] = torch.zeros(64, 128, dtype=torch.bfloat16)

    rewrite(folder, restore)
    fails(folder, "all in 4 bits or none")


def test_half_of_the_experts_parameters_missing(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *FUSE)
    rewrite(folder, lambda tensors: remove(tensors, f"{LAYER}.down_proj"))
    fails(folder, f"{LAYER}.down_proj", "nothing is there")


@pytest.mark.parametrize("flags", [KEEP, FUSE, DOUBLE])
def test_all_experts_of_a_layer_missing(editable: Callable[..., Path], flags: tuple[str, ...]) -> None:
    """transformers would fill the layer's experts with random numbers, and only print so."""
    folder = editable("qwen3_moe", *flags)
    rewrite(folder, lambda tensors: remove(tensors, LAYER))
    fails(folder, "nothing is there", f"{LAYER}.")


@pytest.mark.parametrize("flags", [KEEP, FUSE])
def test_all_experts_missing(editable: Callable[..., Path], flags: tuple[str, ...]) -> None:
    folder = editable("qwen3_moe", *flags)
    rewrite(folder, lambda tensors: [remove(tensors, f"model.layers.{i}.mlp.experts") for i in range(2)])
    fails(folder, "nothing is there", ".mlp.experts.")


def test_all_of_a_linear_missing(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *KEEP)
    rewrite(folder, lambda tensors: remove(tensors, LINEAR))
    fails(folder, "nothing is there", LINEAR)


def test_a_dense_model_without_one_of_its_linears(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", "--exclude", "experts")
    rewrite(folder, lambda tensors: remove(tensors, LINEAR))
    fails(folder, "nothing is there", LINEAR)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_type": "fp4"}, ("quant_type is 'fp4'", "nf4")),
        ({"dtype": "float64"}, ("dtype is 'float64'",)),
        ({"dtype": 16}, ("dtype is 16",)),
    ],
)
def test_a_quant_state_that_contradicts_itself(editable: Callable[..., Path], change: dict, words: tuple[str, ...]) -> None:
    folder = editable("qwen3_moe", *KEEP)
    rewrite(folder, lambda tensors: edit_state(tensors, LINEAR, **change))
    fails(folder, LINEAR, *words)


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [("bnb_4bit_quant_type", "fp4", "bnb_4bit_quant_type"), ("bnb_4bit_use_double_quant", True, "bnb_4bit_use_double_quant")],
)
def test_quant_states_that_contradict_the_config(
    editable: Callable[..., Path], key: str, value: object, word: str
) -> None:
    folder = editable("qwen3_moe", *KEEP)
    edit_config(folder, lambda config: config["quantization_config"].__setitem__(key, value))
    fails(folder, word)


def test_an_expert_with_another_block_size(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe", *KEEP)

    def widen(tensors: Tensors) -> None:
        edit_state(tensors, SINGLE, blocksize=64)
        tensors[f"{SINGLE}.absmax"] = tensors[f"{SINGLE}.absmax"][::2].clone()

    rewrite(folder, widen)
    fails(folder, SINGLE, "block_size is 64", "32")


@pytest.mark.parametrize("flags", [KEEP, FUSE])
def test_a_model_without_experts(sources: Sources, editable: Callable[..., Path], flags: tuple[str, ...]) -> None:
    folder = editable("qwen3_moe", *flags)
    edit_config(folder, lambda config: config.update(model_type="qwen3", architectures=["Qwen3ForCausalLM"]))
    fails(folder, "experts", "Qwen3ForCausalLM", "config.json lies beside it")


def test_a_conversion_that_isnt_known(
    editable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, Concatenate, MergeModulelist

    get = conversion_mapping.get_checkpoint_conversion_mapping

    def strange(model_type: str) -> object:
        conversions = get(model_type)
        for conversion in conversions or []:
            if [type(step) for step in getattr(conversion, "operations", [])] == [MergeModulelist, Concatenate]:
                conversion.operations = [Chunk(dim=0)]
        return conversions

    monkeypatch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", strange)
    fails(editable("qwen3_moe", *KEEP), f"{LAYER}.0.", "Chunk", "isn't known")


def test_a_linear_in_bf16_that_the_config_doesnt_name(editable: Callable[..., Path]) -> None:
    """transformers loads it in silence and fails at the first forward."""
    folder = editable("llama")
    edit_config(folder, lambda config: config["quantization_config"].update(llm_int8_skip_modules=[]))
    fails(folder, "lm_head", "llm_int8_skip_modules")


def test_a_linear_in_4_bits_that_the_config_skips(editable: Callable[..., Path]) -> None:
    folder = editable("llama")
    skip = ["lm_head", "model.layers.0.self_attn.q_proj"]
    edit_config(folder, lambda config: config["quantization_config"].update(llm_int8_skip_modules=skip))
    fails(folder, LINEAR, "llm_int8_skip_modules")


def test_what_a_terminal_would_obey_is_spelled_out() -> None:
    error = PrequantError(Path("a\x1b[2J"), "b\u202e\n", "c\x9b\u200f", "größe \\ 层", "\U000e0041\ud800")
    assert str(error) == r"a\x1b[2J: tensor 'b\u202e\n': c\x9b\u200f; expected größe \ 层; \U000e0041\ud800"
    assert (error.path, error.tensor) == (Path("a\x1b[2J"), "b\u202e\n")


@pytest.mark.parametrize(
    "change",
    [{"data_offsets": [-1, 1]}, {"data_offsets": [8, 0]}, {"data_offsets": [0.0, 8.0]}, {"shape": [-1]}, {"shape": "x"}, {"dtype": 1}],
)
def test_a_header_entry_that_cant_be(tmp_path: Path, change: dict) -> None:
    entry = {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}
    for name, header in (("sound", entry), ("other", entry | change)):
        text = json.dumps({"t": header}).encode()
        (tmp_path / name).write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    assert list(read_header(tmp_path / "sound")) == ["t"]
    with pytest.raises(PrequantError, match="the header says"):
        read_header(tmp_path / "other")


def test_a_truncated_file(sources: Sources, tmp_path: Path) -> None:
    convert(sources.source("llama"), tmp_path / "converted")
    (tmp_path / "converted" / "model.safetensors").write_bytes(b"\x00\x00")
    with pytest.raises(Exception, match=r"model\.safetensors|[Hh]eader"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
