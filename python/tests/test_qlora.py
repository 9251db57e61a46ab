"""A QLoRA run from a checkpoint that prequant converted: adapters learn, the base stays what it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny_models
import torch
from conftest import convert
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import prequant_loader.peft

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.fixture(autouse=True)
def fixed() -> Iterator[None]:
    prequant_loader.peft.fix_peft()
    yield
    prequant_loader.peft._restore_peft()


@pytest.fixture(scope="module", params=["qwen3_moe-keep", "mixtral-fuse", "gpt_oss-fuse"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint: Linears and experts in 4 bits."""
    model_type, layout = request.param.split("-")
    work = tmp_path_factory.mktemp(request.param)
    tiny_models.bf16_model(model_type).save_pretrained(work / "source")
    convert(work / "source", work / "converted", "--experts", layout)
    return work / "converted"


@pytest.fixture
def base_model(folder: Path) -> Callable[[], nn.Module]:
    """Loads it, the same at every call."""
    return lambda: AutoModelForCausalLM.from_pretrained(folder).train()


def adapted(base: nn.Module) -> PeftModel:
    """Fresh adapters, lora_B zero, on attention and on both expert parameters."""
    torch.manual_seed(21)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=ATTENTION, target_parameters=EXPERTS, task_type="CAUSAL_LM")
    return get_peft_model(base, config).train()


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trainable parameters: adapters and nothing else."""
    found = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(".lora_A." in name or ".lora_B." in name for name in found)
    return found


def train(model: nn.Module, steps: int, autocast: bool = False) -> list[float]:
    """The losses of so many steps of AdamW on one batch. Gradients are those of the last step."""
    optimizer = torch.optim.AdamW(adapters(model).values(), lr=1e-2)
    ids = tiny_models.tokens()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def base_digests(model: nn.Module) -> dict[str, str]:
    """A checksum of each tensor of the base: weights, codes, and the statistics of 4-bit parameters."""
    with torch.no_grad():
        return {
            name: hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
            for name, tensor in model.state_dict().items()
            if ".lora_" not in name
        }


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny_models.tokens()).logits


def test_every_adapter_has_a_gradient(base_model: Callable[[], nn.Module]) -> None:
    """In the second step: lora_B begins at zero, and until it has moved lora_A's gradient is zero."""
    model = adapted(base_model())
    assert len(adapters(model)) == 2 * (len(ATTENTION) + len(EXPERTS)) * 2, "layers, targets, A and B"
    train(model, 2)
    for name, parameter in adapters(model).items():
        assert parameter.grad is not None and parameter.grad.any(), f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), name


def test_every_expert_has_a_gradient(base_model: Callable[[], nn.Module]) -> None:
    """lora_A's rows are ordered by expert, and the batch reaches each expert."""
    model = adapted(base_model())
    train(model, 2)
    for name, parameter in adapters(model).items():
        if ".experts." in name and ".lora_A." in name:
            per_expert = parameter.grad.reshape(tiny_models.EXPERTS, -1)
            assert per_expert.any(dim=1).all(), f"{name}: an expert has no gradient"


def test_a_step_moves_adapters_and_nothing_else(base_model: Callable[[], nn.Module], folder: Path) -> None:
    model = adapted(base_model())
    base = base_digests(model)
    of_experts = [name for name in base if ".experts." in name and ".absmax" in name]
    assert len(of_experts) == 2 * len(EXPERTS), "statistics are among what is compared"
    start = {name: parameter.detach().clone() for name, parameter in adapters(model).items()}
    train(model, 2)
    assert base_digests(model) == base == base_digests(adapted(base_model())), "what a fresh load gives"
    prequant_loader.verify(folder)
    for name, parameter in adapters(model).items():
        assert not torch.equal(parameter, start[name]), f"{name} did not move"


def test_loss_goes_down(base_model: Callable[[], nn.Module]) -> None:
    losses = train(adapted(base_model()), 12)
    assert losses[-1] < 0.8 * losses[0], losses


def test_forwards_are_identical(base_model: Callable[[], nn.Module]) -> None:
    """Before training as without adapters, and after it at every forward the same."""
    base = base_model()
    expected = logits(base)
    model = adapted(base)
    assert torch.equal(logits(model), expected)
    train(model, 2)
    first = logits(model)
    assert not torch.equal(first, expected)
    assert torch.equal(logits(model), first) and torch.equal(logits(model), first)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_adapters_saved_and_loaded(base_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = adapted(base_model())
    train(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True).train()
    assert loaded.peft_config["default"].target_parameters is not None
    left, right = adapters(loaded), adapters(model)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in right)
    assert torch.equal(logits(loaded), logits(model))


def test_training_goes_on_from_saved_adapters(base_model: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = adapted(base_model())
    train(model, 3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True).train()
    assert train(loaded, 3) == train(model, 3)


def test_training_under_autocast(base_model: Callable[[], nn.Module]) -> None:
    """As axolotl's `bf16: true`: adapters in f32, forward under autocast."""
    model = adapted(base_model())
    losses = train(model, 12, autocast=True)
    assert losses[-1] < 0.8 * losses[0], losses
    for name, parameter in adapters(model).items():
        assert parameter.dtype == torch.float32 and parameter.grad.any(), f"{name} has no gradient"
