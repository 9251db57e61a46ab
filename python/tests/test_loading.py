"""Models that the loader loads are, bit for bit, what bitsandbytes makes of the bf16 model."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import architectures
import bitsandbytes
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit
from checkpoints import FP4_STATE, load, on_load, quant_state, quantized_names, read_tensors, restored_absmax, same_codes
from conftest import Sources
from damage import rewrite
from packaging.version import Version
from torch import nn
from torch.nn.utils import parametrize
from transformers import AutoConfig, AutoModel, PreTrainedModel

import prequant_loader
from prequant_loader import PrequantError

FORMATS = ("nf4", "fp4")
LAYOUTS = ("keep", "fuse")
EXPERTS = [name for name in architectures.SOURCES if name != "llama"]
SAME_NUMERICS = Version(bitsandbytes.__version__) >= Version("0.50")
"""Before, bitsandbytes on the CPU had other FP4 codes and another table for double quantization than prequant writes."""

EXCEPTIONS = {(name, layout) for name in architectures.FLAGS for layout in LAYOUTS} | {("qwen3_vl_moe-hub", "keep")}
"""Whose blocks aren't those that bitsandbytes makes of the model's parameter, or not in whole rows: only compared with
decoded tensors."""


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of two fixed sequences, in training mode: in eval mode bitsandbytes repacks Linears on some processors."""
    tokens = torch.randint(3, architectures.VOCABULARY - 20, (2, 17), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.train()(tokens).logits


def parametrized(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """The 4-bit parameters outside of Linears: module and name in it."""
    return {
        f"{prefix}.{name}": (module, name)
        for prefix, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name in module.parametrizations
    }


def expert_parameters(model: nn.Module) -> set[str]:
    """The names of all 3-D parameters of experts."""
    return {name for name, tensor in model.named_parameters() if tensor.dim() == 3 and ".experts." in name}


def reference(sources: Sources, name: str, converted: Path, quant_type: str) -> PreTrainedModel:
    """bf16 with Linears quantized on loading, then experts by bitsandbytes' replace_parameter_4bit."""
    config = on_load(converted)
    ours = load(converted, auto=sources.model_class(name)).config.quantization_config
    config.llm_int8_skip_modules = ours.llm_int8_skip_modules
    block_size = architectures.BLOCK_SIZES.get(name, 64)
    model = load(sources.source(name), config, auto=sources.model_class(name))
    requantize_linears(model, load(sources.source(name), auto=sources.model_class(name)), block_size)
    for full_name in expert_parameters(model):
        module, _, leaf = full_name.rpartition(".")
        replace_parameter_4bit(model.get_submodule(module), leaf, quant_type=quant_type, blocksize=block_size)
    return model


def requantize_linears(model: PreTrainedModel, bf16: PreTrainedModel, block_size: int) -> None:
    """Linears in blocks of another size than bitsandbytes' own, which transformers can't be told."""
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit) and module.weight.quant_state.blocksize != block_size:
            codes, state = functional.quantize_4bit(
                bf16.get_parameter(f"{name}.weight").data, blocksize=block_size, quant_type=module.weight.quant_type
            )
            module.weight.data, module.weight.quant_state = codes, state


@pytest.mark.parametrize("quant_type", FORMATS if SAME_NUMERICS else ("nf4",))
@pytest.mark.parametrize(("name", "layout"), sorted(set(product(architectures.SOURCES, LAYOUTS)) - EXCEPTIONS))
def test_logits_equal_quantizing_on_load(sources: Sources, name: str, layout: str, quant_type: str) -> None:
    converted = sources.converted(name, "--format", quant_type, "--experts", layout)
    ours = load(converted, auto=sources.model_class(name))
    theirs = reference(sources, name, converted, quant_type)
    assert parametrized(ours).keys() == parametrized(theirs).keys()
    assert bool(parametrized(ours)) == (name != "llama")
    left, right = ours.state_dict(), theirs.state_dict()
    assert left.keys() == right.keys()
    numbers = [key for key in left if "quant_state" not in key]
    different = [key for key in numbers if not same_codes(left[key], right[key], f"{key}.{FP4_STATE}" in right)]
    assert not different
    assert torch.equal(logits(ours), logits(theirs))


# --- Against bitsandbytes' decoding of the tensors in the file -------------------------------------------------------


def decoded(folder: Path, block_size: int) -> dict[str, torch.Tensor]:
    """Every 4-bit tensor of a folder, decoded by bitsandbytes alone, a block a row: it needs whole blocks in a row."""
    tensors = read_tensors(folder)
    names = quantized_names(tensors)
    weights = {}
    for name in names:
        state = quant_state(tensors, name)
        shape, elements = state.shape, state.shape.numel()
        rows = elements // block_size if elements % block_size == 0 else 1
        state.shape = torch.Size((rows, elements // rows))
        weights[name] = functional.dequantize_4bit(tensors[name].tensor(), state).reshape(shape)
    return weights


def experts_of(weights: dict[str, torch.Tensor], parameter: str, shape: torch.Size) -> torch.Tensor:
    """A model's parameter out of decoded tensors, put together without the loader: by plain cat, stack and transpose."""
    layer = parameter.split(".mlp.")[0].split(".feed_forward.")[0].split(".block_sparse_moe.")[0].split(".experts.")[0]
    number = layer.rpartition(".")[2]
    of_layer = {
        name: tensor
        for name, tensor in weights.items()
        if f"layers.{number}." in name and ("experts." in name or "linear.weight" in name) and "shared" not in name
        and "self_attn" not in name
    }
    gate_up = parameter.endswith("gate_up_proj")
    fused = ("gate_up_proj", "input_linear.weight") if gate_up else ("experts.down_proj", "output_linear.weight")
    whole = [tensor for name, tensor in of_layer.items() if name.endswith(fused)]
    if whole:
        return whole[0] if whole[0].shape == shape else whole[0].transpose(1, 2).contiguous()
    ends = [("gate_proj", "w1"), ("up_proj", "w3")] if gate_up else [("down_proj", "w2")]
    experts = [
        torch.cat([
            next(t for n, t in of_layer.items() if n.endswith(tuple(f"experts.{i}.{e}.weight" for e in end)))
            for end in ends
        ])
        for i in range(shape[0])
    ]
    return torch.stack(experts)


@pytest.mark.parametrize("quant_type", FORMATS)
@pytest.mark.parametrize(
    ("name", "layout", "double"),
    [(name, layout, ("--double-quant",)) for name, layout in product(EXPERTS, LAYOUTS)]
    + [(name, layout, ()) for name, layout in sorted(EXCEPTIONS)],
)
def test_logits_equal_bitsandbytes_own_decoding(
    sources: Sources, name: str, layout: str, double: tuple[str, ...], quant_type: str
) -> None:
    converted = sources.converted(name, "--format", quant_type, "--experts", layout, *double)
    ours, theirs = (load(converted, auto=sources.model_class(name)) for _ in range(2))
    weights = decoded(converted, architectures.BLOCK_SIZES.get(name, 64))
    found = parametrized(theirs)
    assert found.keys() == expert_parameters(load(sources.source(name), auto=sources.model_class(name)))
    for full_name, (module, leaf) in found.items():
        shape = getattr(module, leaf).shape
        expected = experts_of(weights, full_name, shape)
        assert torch.equal(getattr(module, leaf), expected), full_name
        parametrize.remove_parametrizations(module, leaf, leave_parametrized=False)
        setattr(module, leaf, nn.Parameter(expected))
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.skipif(not SAME_NUMERICS, reason="bitsandbytes before 0.50 has other numerics on the CPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", EXPERTS)
def test_double_quantization_is_no_further_from_bf16_than_bitsandbytes(
    sources: Sources, name: str, layout: str
) -> None:
    """Codes are the same, so the distance is that of the scales: squared and largest error, over each tensor in the file.

    The bound is bitsandbytes' error plus what rounding to f32 may add: restoring a scale takes a product and a sum.
    """
    plain, double = (
        read_tensors(sources.converted(name, "--experts", layout, *flags)) for flags in ((), ("--double-quant",))
    )
    assert quantized_names(plain) == quantized_names(double)
    for weight in quantized_names(plain):
        assert plain[weight] == double[weight], f"{weight}: codes differ"
        true = plain[f"{weight}.absmax"].tensor()
        offset = true.mean()
        codes, nested = functional.quantize_blockwise(true - offset, blocksize=256)
        theirs = functional.dequantize_blockwise(codes, nested) + offset
        mine = restored_absmax(quant_state(double, weight))
        rounding = 2 * torch.finfo(torch.float32).eps * true.max().item()
        errors = [(restored.double() - true.double()).abs() for restored in (mine, theirs)]
        assert errors[0].max() <= errors[1].max() + rounding, weight
        assert errors[0].norm() <= errors[1].norm() + rounding * math.sqrt(len(true)), weight


# --- Other checkpoints -----------------------------------------------------------------------------------------------


def test_parts_of_an_expert_lie_in_different_shards(sources: Sources) -> None:
    """What the other tests rely on."""
    for folder in (sources.source("qwen3_moe"), sources.converted("qwen3_moe", "--experts", "keep")):
        files = {
            file for name, file in architectures.shards_of(folder).items() if name.startswith("model.layers.0.mlp.experts.1.")
        }
        assert len(files) > 1, folder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss", "llama4", "granitemoe", "qwen3_vl_moe-hub"])
def test_a_layer_in_bf16_beside_one_in_4_bits(sources: Sources, name: str, layout: str) -> None:
    converted = sources.converted(name, "--experts", layout, "--exclude", r"layers\.0\.")
    ours = load(converted, auto=sources.model_class(name))
    everything = load(sources.converted(name, "--experts", layout), auto=sources.model_class(name))
    bf16 = load(sources.source(name), auto=sources.model_class(name))
    found = parametrized(ours)
    assert found and all(".layers.1." in full_name for full_name in found)
    for full_name in expert_parameters(bf16):
        module, _, leaf = full_name.rpartition(".")
        expected = everything if ".layers.1." in full_name else bf16
        weights = [getattr(model.get_submodule(module), leaf) for model in (ours, expected)]
        assert torch.equal(*weights) and weights[0].dtype == torch.bfloat16, full_name
    assert logits(ours).isfinite().all()


@pytest.mark.parametrize("name", [name for name in EXPERTS if name not in architectures.FLAGS])
def test_linears_in_4_bits_and_experts_in_bf16(sources: Sources, name: str) -> None:
    ours = load(sources.converted(name, "--exclude", "experts|block_sparse_moe"), auto=sources.model_class(name))
    assert not parametrized(ours)
    assert any(isinstance(module, Linear4bit) for module in ours.modules())
    bf16 = load(sources.source(name), auto=sources.model_class(name))
    for full_name in expert_parameters(bf16):
        assert torch.equal(ours.get_parameter(full_name), bf16.get_parameter(full_name)), full_name
    assert logits(ours).isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_decoded_to_the_dtype_of_the_embeddings(sources: Sources, layout: str) -> None:
    converted = sources.converted("qwen3_moe", "--experts", layout)
    model = sources.model_class("qwen3_moe").from_pretrained(converted, dtype=torch.float32)
    for module, leaf in parametrized(model).values():
        assert getattr(module, leaf).dtype == model.get_input_embeddings().weight.dtype
    assert logits(model).isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "granitemoe"])
def test_the_model_without_its_head(sources: Sources, name: str, layout: str) -> None:
    """AutoModel: names in the file begin with what the model's own don't."""
    converted = sources.converted(name, "--experts", layout)
    body, whole = AutoModel.from_pretrained(converted), load(converted, auto=sources.model_class(name))
    left, right = body.state_dict(), whole.model.state_dict()
    assert left.keys() == right.keys() and any("experts" in key for key in left)
    assert not [key for key in left if not torch.equal(left[key], right[key])]


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_device_map(sources: Sources, layout: str, device_map: str | dict[str, str]) -> None:
    converted = sources.converted("qwen3_moe", "--experts", layout)
    expected = load(converted, auto=sources.model_class("qwen3_moe"))
    ours = sources.model_class("qwen3_moe").from_pretrained(converted, device_map=device_map)
    assert torch.equal(logits(ours.to("cpu")), logits(expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_that_transformers_leaves_out_on_purpose(
    sources: Sources, editable: Callable[..., Path], layout: str
) -> None:
    """deepseek_v3's 61st layer predicts more tokens, and transformers has no use for it."""
    folder = editable("deepseek_v3", "--experts", layout)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        layer = {name: tensor for name, tensor in tensors.items() if ".layers.1." in name}
        tensors |= {name.replace(".layers.1.", ".layers.61."): tensor.clone() for name, tensor in layer.items()}

    rewrite(folder, add)
    expected = load(sources.converted("deepseek_v3", "--experts", layout), auto=sources.model_class("deepseek_v3"))
    assert torch.equal(logits(sources.model_class("deepseek_v3").from_pretrained(folder)), logits(expected))


def test_fused_experts_are_views_of_the_file(sources: Sources) -> None:
    """Nothing is copied: the codes lie in the file's mapping."""
    converted = sources.converted("qwen3_moe", "--experts", "fuse")
    model = load(converted, auto=sources.model_class("qwen3_moe"))
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(converted) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for module, leaf in parametrized(model).values():
        codes = getattr(module.parametrizations, leaf).original
        assert any(begin <= codes.data_ptr() < end for begin, end in ranges)


# --- Saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [(), ("--double-quant",)], ids=["", "double"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", architectures.SOURCES)
def test_saved_models_load_to_the_same_bytes(
    sources: Sources, name: str, layout: str, double: tuple[str, ...], tmp_path: Path
) -> None:
    converted = sources.converted(name, "--experts", layout, *double)
    model_class = sources.model_class(name)
    first = load(converted, auto=model_class)
    first.save_pretrained(tmp_path, max_shard_size="50KB")
    second = load(tmp_path, auto=model_class)
    left, right = first.state_dict(), second.state_dict()
    assert left.keys() == right.keys()
    assert not [key for key in left if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key])]
    assert torch.equal(logits(first), logits(second))
    if layout == "fuse" or not parametrized(first):
        assert payload(converted) == payload(tmp_path)


def payload(folder: Path) -> dict[str, list[bytes]]:
    """Codes and statistics of a folder's 4-bit tensors, by name; transformers saves mixtral's under an older one."""
    tensors = read_tensors(folder)
    parts = ("", ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
    return {
        name.replace(".block_sparse_moe.experts.", ".mlp.experts."): [tensors[name + part].data for part in parts if name + part in tensors]
        for name in quantized_names(tensors)
    }


def test_only_the_parametrization_of_bitsandbytes_is_used_where_blocks_allow(sources: Sources) -> None:
    """What others look for: PEFT and axolotl know bitsandbytes' own class."""
    model = load(sources.converted("qwen3_moe", "--experts", "keep"), auto=sources.model_class("qwen3_moe"))
    for module, leaf in parametrized(model).values():
        assert type(module.parametrizations[leaf][0]) is Bnb4bitParametrization


# --- Models that aren't all of what is stored ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama4", "llama"])
def test_a_shorter_model_is_the_first_layers(sources: Sources, name: str, layout: str) -> None:
    """transformers reports the tensors of the others, and so it is with 4-bit ones."""
    folder = sources.converted(name, "--experts", layout)
    whole = sources.model_class(name).from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config().num_hidden_layers = 1
    short, info = sources.model_class(name).from_pretrained(folder, config=config, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]
    left, right = short.state_dict(), whole.state_dict()
    assert left.keys() < right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left if not key.endswith("quant_state.bitsandbytes__nf4"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_are_parametrized_in_the_models_order(sources: Sources, layout: str) -> None:
    """PEFT nests adapters in it, and plain PEFT in that of the bf16 model."""
    model = sources.model_class("qwen3_moe").from_pretrained(sources.converted("qwen3_moe", "--experts", layout))
    modules = [module for module in model.modules() if parametrize.is_parametrized(module)]
    assert modules
    assert all(list(module.parametrizations) == ["gate_up_proj", "down_proj"] for module in modules)


# --- Codes that are stored as floats, for FSDP1 ----------------------------------------------------------------------


@pytest.mark.parametrize("flags", [("--experts", "keep"), ("--experts", "keep", "--double-quant"), ("--experts", "fuse")])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "llama"])
def test_the_dtype_of_codes_changes_nothing_else(sources: Sources, name: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    plain = load(sources.converted(name, *flags), auto=sources.model_class(name))
    folder = sources.converted(name, *flags, "--quant-storage", "bfloat16")
    model = load(folder, auto=sources.model_class(name))
    left, right = model.state_dict(), plain.state_dict()
    assert left.keys() == right.keys()
    for key, tensor in right.items():
        is_codes = f"{key}.quant_map" in right
        assert left[key].dtype == (torch.bfloat16 if is_codes else tensor.dtype), key
        assert torch.equal(left[key].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), key
    assert torch.equal(logits(model), logits(plain))
    prequant_loader.verify(folder)
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", auto=sources.model_class(name))
    assert torch.equal(logits(again), logits(plain))


def test_codes_stored_as_floats_are_not_converted_to_others(sources: Sources) -> None:
    folder = sources.converted("qwen3_moe", "--quant-storage", "float32")
    with pytest.raises(PrequantError, match=r"stored as float32; expected the model's torch.bfloat16"):
        sources.model_class("qwen3_moe").from_pretrained(folder)
    sources.model_class("qwen3_moe").from_pretrained(folder, dtype=torch.float32)
