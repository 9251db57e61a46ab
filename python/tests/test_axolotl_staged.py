"""The plugin in axolotl's staged loading, with axolotl itself: only where it is installed. A whole run is tests/conformance/axolotl_run.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import architectures
import prequant_loader
import pytest
import torch
from conftest import Sources
from torch import nn
from torch.nn.utils import parametrize

if importlib.util.find_spec("axolotl") is None or sys.version_info < (3, 12):
    pytest.skip("axolotl isn't installed", allow_module_level=True)

from axolotl.loaders.nf4 import load_nf4_model
from axolotl.monkeypatch import moe_quant
from axolotl.utils.dict import DictDefault
from axolotl.utils.nf4 import BnbNF4Parametrization
from transformers import AutoConfig, BitsAndBytesConfig

EXPERTS = [name for name in architectures.SOURCES if name != "llama"]
FLAGS = {"plain": (), "double": ("--double-quant",), "bf16-codes": ("--quant-storage", "bfloat16")}


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """transformers and PEFT as they were: axolotl patches them for good."""
    from prequant_loader.peft import _restore_peft

    _restore_peft()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
        yield
    prequant_loader.install()


@pytest.fixture
def plugin() -> Any:
    from prequant_loader.axolotl import PrequantPlugin

    return PrequantPlugin()


def staged(plugin: Any, sources: Sources, name: str, folder: Path) -> nn.Module:
    """As axolotl loads it in a single process."""
    config = AutoConfig.from_pretrained(folder)
    cfg = DictDefault(
        base_model=str(folder),
        load_in_4bit=True,
        adapter="qlora",
        qlora_sharded_model_loading=True,
        torch_dtype=torch.bfloat16,
        model_config_type=config.model_type,
    )
    plugin.pre_model_load(cfg)
    quantization = BitsAndBytesConfig(**config.quantization_config)
    options = {"dtype": torch.bfloat16, "device_map": {"": "cpu"}, "quantization_config": quantization}
    model = load_nf4_model(sources.model_class(name), config, options, cfg, quantization_device="cpu")
    model._moe_experts_quantized = False
    plugin.post_model_build(cfg, model)
    return model


def decoded(model: nn.Module) -> dict[str, torch.Tensor]:
    """All weights by name, decoded."""
    names = {name.replace(".parametrizations.", ".").removesuffix(".original") for name, _ in model.named_parameters()}
    found = {}
    for name in names:
        module, _, leaf = name.rpartition(".")
        weight = getattr(model.get_submodule(module), leaf)
        state = getattr(weight, "quant_state", None)
        if state is not None:
            from bitsandbytes.functional import dequantize_4bit

            weight = dequantize_4bit(weight.detach().view(torch.uint8).reshape(-1, 1), state).reshape(state.shape)
        found[name] = weight.detach()
    return found


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", EXPERTS)
def test_weights_are_those_of_a_plain_load(
    plugin: Any, sources: Sources, name: str, layout: str, flags: tuple[str, ...]
) -> None:
    folder = sources.converted(name, "--experts", layout, *flags)
    prequant_loader.install()
    expected = decoded(sources.model_class(name).from_pretrained(folder, dtype=torch.bfloat16))
    model = staged(plugin, sources, name, folder)
    found = decoded(model)
    assert found.keys() == expected.keys()
    for weight, values in expected.items():
        assert torch.equal(found[weight], values), weight
    assert model._moe_experts_quantized is True


def test_codes_are_parameters_and_scales_are_buffers(plugin: Any, sources: Sources) -> None:
    """What FSDP2 shards, and what it hands out whole; and the order of definition, which adapters nest in."""
    model = staged(plugin, sources, "qwen3_moe", sources.converted("qwen3_moe"))
    experts = {path: module for path, module in model.named_modules() if path.endswith(".experts")}
    assert len(experts) == 2
    for path, module in experts.items():
        assert moe_quant.export_moe_load_state()["expert_param_order"][path] == ["gate_up_proj", "down_proj"]
        for name in ("gate_up_proj", "down_proj"):
            chain = module.parametrizations[name]
            assert isinstance(chain[0], BnbNF4Parametrization)
            assert chain.original.dtype == torch.uint8 and not chain.original.requires_grad
            assert {"absmax", "code"} <= dict(chain[0].named_buffers()).keys()
    linear = model.get_submodule("model.layers.0.self_attn.q_proj")
    assert type(linear) is not nn.Linear and isinstance(linear, nn.Linear) and parametrize.is_parametrized(linear, "weight")


def test_a_plain_load_comes_after_a_staged_one(plugin: Any, sources: Sources) -> None:
    folder = sources.converted("qwen3_moe")
    staged(plugin, sources, "qwen3_moe", folder)
    prequant_loader.install()
    model = sources.model_class("qwen3_moe").from_pretrained(folder)
    assert not any(isinstance(module, BnbNF4Parametrization) for module in model.modules())
    prequant_loader.uninstall()
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    assert AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] is Bnb4BitHfQuantizer
