"""The loader with checkpoints that bitsandbytes quantized: these tests need no prequant, and run from an unpacked sdist."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes
import handmade
import prequant_loader
import pytest
import tiny_models
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit
from conftest import convert
from packaging.version import Version
from peft import LoraConfig, get_peft_model
from prequant_loader import PrequantError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("handmade") / "source"
    tiny_models.bf16_model("qwen3_moe").save_pretrained(folder)
    return folder


@pytest.fixture(params=["keep", "fuse"])
def layout(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "double"])
def double_quant(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def folder(source: Path, tmp_path: Path, layout: str) -> Path:
    return handmade.convert(source, tmp_path / "converted", layout)


def quantized_on_load(source: Path) -> nn.Module:
    """The bf16 checkpoint: Linears quantized by transformers, then experts by bitsandbytes."""
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=options, dtype=torch.bfloat16)
    for module in tiny_models.experts(model):
        for name in ("gate_up_proj", "down_proj"):
            replace_parameter_4bit(module, name, quant_type="nf4")
    return model.train()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_models.tokens()).logits


def adapted(base: nn.Module) -> nn.Module:
    torch.manual_seed(21)
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], target_parameters=parameters)).train()


def losses(model: nn.Module, steps: int) -> list[float]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=tiny_models.tokens(), labels=tiny_models.tokens()).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def test_logits_are_those_after_quantization_on_load(source: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    assert all(
        isinstance(module.parametrizations[name][0], Bnb4bitParametrization)
        for module in tiny_models.experts(model)
        for name in ("gate_up_proj", "down_proj")
    )
    assert torch.equal(logits(model), logits(quantized_on_load(source)))


def test_training_gives_the_losses_after_quantization_on_load(source: Path, folder: Path) -> None:
    model = adapted(AutoModelForCausalLM.from_pretrained(folder))
    found = losses(model, 4)
    assert found[-1] < found[0]
    assert found == losses(adapted(quantized_on_load(source)), 4)


def test_layouts_give_the_same(source: Path, tmp_path: Path) -> None:
    first, second = (
        AutoModelForCausalLM.from_pretrained(handmade.convert(source, tmp_path / layout, layout)).train()
        for layout in ("keep", "fuse")
    )
    assert torch.equal(logits(first), logits(second))


def test_what_is_saved_loads_again(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).train()
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved").train()), logits(model))


def test_experts_are_what_bitsandbytes_decodes(source: Path, tmp_path: Path, layout: str, double_quant: bool) -> None:
    folder = handmade.convert(source, tmp_path / "converted", layout, double_quant)
    model = AutoModelForCausalLM.from_pretrained(folder)
    expected = handmade.decoded_experts(folder)
    assert len(expected) == 2 * 2, "layers, parameters"
    for name, values in expected.items():
        module, _, leaf = name.rpartition(".")
        assert torch.equal(getattr(model.get_submodule(module), leaf), values), name


def test_a_missing_statistic_is_an_error(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    lost = next(name for name in tensors if ".experts." in name and name.endswith(".absmax"))
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(PrequantError, match=r"model\.safetensors.*absmax"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_without_a_manifest_there_is_nothing_to_verify(folder: Path) -> None:
    with pytest.raises(PrequantError, match=r"prequant\.json"):
        prequant_loader.verify(folder)


def test_prequant_writes_the_same_bytes(source: Path, tmp_path: Path, layout: str, double_quant: bool) -> None:
    """Where it is at hand."""
    if double_quant and Version(bitsandbytes.__version__) < Version("0.50"):
        pytest.skip("before 0.50 bitsandbytes' table for scales is another on the CPU than on GPUs")
    expected = load_file(handmade.convert(source, tmp_path / "by-hand", layout, double_quant) / "model.safetensors")
    convert(source, tmp_path / "converted", "--experts", layout, *["--double-quant"] * double_quant)
    found = load_file(tmp_path / "converted" / "model.safetensors")
    assert found.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(found[name], expected[name])]
    # prequant's mean of scales is exact; bitsandbytes adds them up in f32.
    offsets = {name for name in differing if ".quant_state." in name or name.endswith((".nested_absmax", ".absmax"))}
    assert set(differing) == (offsets if double_quant else set()), differing
