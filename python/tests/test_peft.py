"""PEFT's faults with 4-bit experts: each is there without fix_peft and gone with it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import bitsandbytes
import peft
import pytest
import tiny_models
import torch
import torch.nn.utils.parametrize as parametrize
from bitsandbytes import functional
from conftest import Sources
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import AutoModelForCausalLM

import prequant_loader.peft

SUFFIXES = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
PILES_UP = prequant_loader.peft._version() >= (0, 21)
"""Whether this PEFT leaves its proxy in the parametrization."""


@pytest.fixture
def unfixed() -> Iterator[None]:
    """PEFT as it came."""
    prequant_loader.peft._restore_peft()
    yield
    prequant_loader.peft._restore_peft()


@pytest.fixture
def fixed() -> Iterator[None]:
    """PEFT with the fixes."""
    prequant_loader.peft.fix_peft()
    yield
    prequant_loader.peft._restore_peft()


@pytest.fixture
def uncached() -> Iterator[None]:
    """torch's cache of decoded parameters, off and empty again at the end."""
    yield
    parametrize._cache_enabled = 0
    parametrize._cache = {}


def adapt(model: nn.Module, parameters: list[str], modules: list[str] | None = None) -> PeftModel:
    """Adapters that aren't zero at their start."""
    torch.manual_seed(20)
    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj"] if modules is None else modules,
        target_parameters=parameters,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, config).train()


def whole_names(model: nn.Module, *parameters: str) -> list[str]:
    """The named parameters of each layer's experts."""
    return [
        f"{name}.{parameter}"
        for name, _ in model.named_modules()
        if name.endswith(".experts")
        for parameter in parameters
    ]


def decoded_model(model_type: str = "qwen3_moe") -> nn.Module:
    """The quantized model's values in bf16 parameters, as PEFT can handle them without any fix."""
    model, quantized = tiny_models.bf16_model(model_type), tiny_models.quantized_model(model_type)
    with torch.no_grad():
        for module, source in zip(tiny_models.experts(model), tiny_models.experts(quantized), strict=True):
            for name in ("gate_up_proj", "down_proj"):
                getattr(module, name).copy_(getattr(source, name))
    return model.requires_grad_(False).train()


def wrappers(model: nn.Module) -> list[tuple[str, str]]:
    """Module and parameter of each wrapper around a parameter, from the outside in."""
    return [(name, module.parameter_name) for name, module in model.named_modules() if isinstance(module, ParamWrapper)]


def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=tiny_models.tokens()).logits


def checkpointed(model: PeftModel, reentrant: bool = False) -> PeftModel:
    """With layers computed again in the backward."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


def without_gradient(model: nn.Module) -> list[str]:
    """The trainable parameters that a backward gives no gradient, or one of zeros."""
    ids = tiny_models.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.any())
    ]


# --- Suffixes --------------------------------------------------------------------------------------------------------


def test_the_package_itself_has_the_fix(unfixed: None) -> None:
    original = ParamWrapper._activate_lora
    prequant_loader.fix_peft()
    try:
        assert ParamWrapper._activate_lora is not original
    finally:
        prequant_loader.peft._restore_peft()


def test_the_package_does_without_peft_and_says_what_is_missing() -> None:
    script = (
        "import sys; sys.modules['peft'] = None; import prequant_loader\n"
        "try: prequant_loader.fix_peft()\n"
        "except ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "prequant-loader[peft]" in run.stdout


def test_suffixes_match_nothing_without_the_fix(unfixed: None) -> None:
    assert wrappers(adapt(tiny_models.quantized_model(), SUFFIXES)) == []
    assert len(wrappers(adapt(decoded_model(), SUFFIXES))) == 4, "a fault of parametrized experts only"


@pytest.mark.parametrize("suffix", ["mlp.experts.down_proj", "experts.down_proj", "down_proj"])
def test_suffixes_match(fixed: None, suffix: str) -> None:
    model = adapt(tiny_models.quantized_model(), [suffix])
    expected = [(f"base_model.model.model.layers.{layer}.mlp.experts", "down_proj") for layer in (0, 1)]
    assert wrappers(model) == expected
    names = [f"model.layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)]
    assert model.base_model.targeted_parameter_names == names


def test_whole_names_match_one_layer(fixed: None) -> None:
    model = adapt(tiny_models.quantized_model(), ["model.layers.1.mlp.experts.down_proj"])
    assert wrappers(model) == [("base_model.model.model.layers.1.mlp.experts", "down_proj")]


def test_suffixes_begin_at_a_dot(fixed: None) -> None:
    assert wrappers(adapt(tiny_models.quantized_model(), ["up_proj", "original", "xperts.down_proj"])) == []


# --- Order -----------------------------------------------------------------------------------------------------------


def test_order_is_alphabetical_without_the_fix(unfixed: None) -> None:
    model = tiny_models.quantized_model()
    found = wrappers(adapt(model, whole_names(model, "gate_up_proj", "down_proj")))
    assert [name for _, name in found] == ["gate_up_proj", "down_proj"] * 2, "from the outside in"
    expected = wrappers(adapt(decoded_model(), SUFFIXES))
    assert [name for _, name in expected] == ["down_proj", "gate_up_proj"] * 2, "what bf16 experts get"


@pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)
def test_adapters_are_those_of_bf16_experts(fixed: None, model_type: str) -> None:
    quantized = adapt(tiny_models.quantized_model(model_type), SUFFIXES)
    prequant_loader.peft._restore_peft()
    plain = adapt(decoded_model(model_type), SUFFIXES)
    assert wrappers(quantized) == wrappers(plain)
    left, right = (peft.get_peft_model_state_dict(model) for model in (quantized, plain))
    assert {name: tensor.shape for name, tensor in left.items()} == {n: t.shape for n, t in right.items()}


@pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)
def test_outputs_and_gradients_are_those_of_bf16_experts(fixed: None, model_type: str) -> None:
    """With experts decoded to bf16 parameters PEFT needs no fix: same logits, same gradients, bit for bit."""
    quantized = adapt(tiny_models.quantized_model(model_type), SUFFIXES)
    found = logits(quantized).detach()
    assert without_gradient(quantized) == []
    prequant_loader.peft._restore_peft()
    plain = adapt(decoded_model(model_type), SUFFIXES)
    adapters = {name: parameter for name, parameter in quantized.named_parameters() if parameter.requires_grad}
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(adapters[name].data)
    assert torch.equal(found, logits(plain))
    assert without_gradient(plain) == []
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.requires_grad}
    for name, parameter in quantized.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, gradients.pop(name)), name
    assert not gradients


def test_fixed_peft_treats_bf16_experts_as_before(fixed: None) -> None:
    ours = adapt(decoded_model(), SUFFIXES)
    found = logits(ours)
    prequant_loader.peft._restore_peft()
    theirs = adapt(decoded_model(), SUFFIXES)
    assert wrappers(ours) == wrappers(theirs)
    assert torch.equal(found, logits(theirs))


# --- Piling up -------------------------------------------------------------------------------------------------------


def proxies(model: nn.Module) -> int:
    """What PEFT left in the parametrizations of all experts."""
    chains = (module.parametrizations["gate_up_proj"] for module in tiny_models.experts(model))
    return sum(len(chain) - 1 for chain in chains)


@pytest.mark.skipif(not PILES_UP, reason="since PEFT 0.21")
def test_delta_piles_up_without_the_fix(unfixed: None) -> None:
    model = tiny_models.quantized_model()
    model = adapt(model, whole_names(model, "gate_up_proj"))
    with torch.no_grad(), pytest.warns(UserWarning, match="Could not find any LoRA parametrization"):
        first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    assert proxies(model) == 2 * 2, "two layers, two forwards"


@pytest.mark.skipif(not PILES_UP, reason="since PEFT 0.21")
@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
def test_second_training_forward_fails_without_the_fix(unfixed: None) -> None:
    model = tiny_models.quantized_model()
    model = adapt(model, whole_names(model, "gate_up_proj"))
    logits(model)
    with pytest.raises(RuntimeError, match="floating point dtype can require gradients"):
        logits(model)


@pytest.mark.skipif(PILES_UP, reason="before PEFT 0.21")
def test_delta_does_not_pile_up_in_older_peft(unfixed: None) -> None:
    model = tiny_models.quantized_model()
    model = adapt(model, whole_names(model, "gate_up_proj"))
    assert torch.equal(logits(model), logits(model))
    assert proxies(model) == 0


@pytest.mark.parametrize("gradient", [False, True])
def test_two_forwards_are_identical(fixed: None, gradient: bool) -> None:
    model = adapt(tiny_models.quantized_model(), SUFFIXES)
    with torch.set_grad_enabled(gradient):
        assert torch.equal(logits(model), logits(model))
    assert proxies(model) == 0


def test_nothing_stays_after_an_error(fixed: None) -> None:
    model = adapt(tiny_models.quantized_model(), SUFFIXES)
    expected = logits(model)

    def stop(*_: object) -> None:
        raise KeyError("planted")

    handle = tiny_models.experts(model)[0].register_forward_pre_hook(stop, prepend=True)
    with pytest.raises(KeyError, match="planted"):
        logits(model)
    handle.remove()
    assert proxies(model) == 0
    assert torch.equal(logits(model), expected)


def test_adapters_can_be_switched_off(fixed: None) -> None:
    expected = logits(tiny_models.quantized_model())
    model = adapt(tiny_models.quantized_model(), SUFFIXES)
    assert not torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


# --- Two parameters of one module ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Could not find any LoRA parametrization")
def test_inner_adapter_has_no_effect_without_the_fix(unfixed: None) -> None:
    model = tiny_models.quantized_model()
    model = adapt(model, whole_names(model, "gate_up_proj", "down_proj"))
    layer = "base_model.model.model.layers.{}.mlp.experts.base_layer.lora_{}.default.weight"
    assert without_gradient(model) == [layer.format(number, part) for number in (0, 1) for part in "AB"]


def test_both_adapters_get_a_gradient(fixed: None) -> None:
    model = adapt(tiny_models.quantized_model(), SUFFIXES)
    assert without_gradient(model) == []


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("parameters", [SUFFIXES, ["model.layers.1.mlp.experts.down_proj"]])
def test_gradient_checkpointing_changes_no_gradient(
    fixed: None, uncached: None, parameters: list[str], reentrant: bool
) -> None:
    expected = adapt(tiny_models.quantized_model(), parameters)
    assert without_gradient(expected) == []
    model = checkpointed(adapt(tiny_models.quantized_model(), parameters), reentrant)
    for _ in range(2):  # whatever a first step leaves behind would show in the second
        model.zero_grad()
        assert without_gradient(model) == []
        for (name, ours), theirs in zip(model.named_parameters(), expected.parameters(), strict=True):
            assert not ours.requires_grad or torch.equal(ours.grad, theirs.grad), name


def test_gradient_checkpointing_keeps_no_adapted_expert_in_memory(fixed: None, uncached: None) -> None:
    model = checkpointed(adapt(tiny_models.quantized_model(), SUFFIXES))
    assert without_gradient(model) == []
    assert not parametrize._cache


def test_gradient_checkpointing_keeps_other_experts_in_memory_before_bitsandbytes_0_50(
    fixed: None, uncached: None
) -> None:
    """A fault of bitsandbytes, with and without PEFT: it takes a forward that is stopped early for one still going."""
    model = checkpointed(adapt(tiny_models.quantized_model(), []))
    assert without_gradient(model) == []
    kept = bitsandbytes.__version__ < "0.50"
    assert bool(parametrize._cache) == kept


def test_parameters_are_decoded_once_more_than_without_adapters(fixed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    decode = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a, **k: calls.append(1) or decode(*a, **k))
    logits(tiny_models.quantized_model())
    without = len(calls)
    model = adapt(tiny_models.quantized_model(), SUFFIXES)
    calls.clear()
    logits(model)
    assert without == 4 and len(calls) <= 2 * without, f"{len(calls)} times"


# --- Names inside a parametrization ----------------------------------------------------------------------------------


def test_target_modules_match_a_parametrization_without_the_fix(unfixed: None) -> None:
    with pytest.raises(ValueError, match="ParametrizationList"):
        adapt(tiny_models.quantized_model("gpt_oss"), [], ["q_proj", "down_proj"])
    adapt(decoded_model("gpt_oss"), [], ["q_proj", "down_proj"])


@pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)
@pytest.mark.parametrize("modules", [["q_proj"], ["q_proj", "down_proj"], ["q_proj", "gate_up_proj"]])
@pytest.mark.parametrize("parameters", [[], ["experts.down_proj"], ["down_proj", "gate_up_proj"]])
def test_targets_match_what_they_match_in_bf16(
    fixed: None, model_type: str, modules: list[str], parameters: list[str]
) -> None:
    quantized = adapt(tiny_models.quantized_model(model_type), parameters, modules).base_model
    prequant_loader.peft._restore_peft()
    plain = adapt(decoded_model(model_type), parameters, modules).base_model
    assert wrappers(quantized) == wrappers(plain)
    assert quantized.targeted_module_names == plain.targeted_module_names
    assert quantized.targeted_parameter_names == plain.targeted_parameter_names


# --- Merging ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
def test_merging_loses_the_adapter_without_the_fix(unfixed: None) -> None:
    model = tiny_models.quantized_model()
    base = logits(model)
    merged = adapt(model, whole_names(model, "down_proj"), []).merge_and_unload()
    assert torch.equal(logits(merged), base)


def test_merging_is_an_error(fixed: None) -> None:
    model = adapt(tiny_models.quantized_model(), SUFFIXES, [])
    with pytest.raises(ValueError, match="can't be merged into 4-bit experts"):
        model.merge_and_unload()


def test_merging_into_bf16_works(fixed: None) -> None:
    base = logits(decoded_model())
    merged = adapt(decoded_model(), SUFFIXES, []).merge_and_unload()
    assert not torch.equal(logits(merged), base)


# --- Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(prequant_loader.peft._version() >= (0, 20), reason="before PEFT 0.20")
def test_adapters_cannot_be_loaded_without_the_fix(unfixed: None, tmp_path: Path) -> None:
    """Not even for bf16 experts."""
    adapt(decoded_model(), SUFFIXES).save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="distributed_operation"):
        PeftModel.from_pretrained(decoded_model(), tmp_path)


@pytest.mark.parametrize("model_type", tiny_models.MODEL_TYPES)
def test_adapters_trained_in_4_bits_are_loaded_onto_bf16_experts(fixed: None, model_type: str, tmp_path: Path) -> None:
    quantized = adapt(tiny_models.quantized_model(model_type), SUFFIXES)
    quantized.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(decoded_model(model_type), tmp_path).train()
    assert torch.equal(logits(model), logits(quantized))


# --- More adapters, and the fix itself -------------------------------------------------------------------------------


def test_a_second_adapter(fixed: None) -> None:
    """From 0.20 on a model takes two adapters with target_parameters; earlier versions say they don't."""
    model = adapt(tiny_models.quantized_model(), SUFFIXES)
    first, found = logits(model), wrappers(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], target_parameters=SUFFIXES, init_lora_weights=False)
    if prequant_loader.peft._version() < (0, 20):
        with pytest.raises(ValueError, match="one LoRA adapter per model"):
            model.add_adapter("second", config)
        return
    model.add_adapter("second", config)
    assert wrappers(model) == found, "the same wrappers hold both"
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert not torch.equal(logits(model), first)
    assert torch.equal(logits(model), logits(model))
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_a_module_named_twice_is_an_error(fixed: None) -> None:
    with pytest.raises(ValueError, match="target_modules also names"):
        adapt(tiny_models.quantized_model(), ["self_attn.q_proj.weight"])


def test_fix_is_idempotent_and_can_be_taken_back(unfixed: None) -> None:
    before = ParamWrapper._activate_lora, ParamWrapper.merge, ParamWrapper._remove_parametrizations
    prequant_loader.peft.fix_peft()
    once = ParamWrapper._activate_lora
    prequant_loader.peft.fix_peft()
    assert ParamWrapper._activate_lora is once
    prequant_loader.peft._restore_peft()
    assert before == (ParamWrapper._activate_lora, ParamWrapper.merge, ParamWrapper._remove_parametrizations)


@pytest.mark.parametrize("version", ["0.18.1", "0.22.0.dev0", "1.0.0"])
def test_unknown_versions_are_an_error(unfixed: None, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    before = ParamWrapper._activate_lora
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(RuntimeError, match=f"peft {version}.*0.19, 0.20, 0.21"):
        prequant_loader.peft.fix_peft()
    assert ParamWrapper._activate_lora is before


@pytest.mark.usefixtures("unfixed")
def test_loading_4_bit_experts_fixes_peft(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a word in the user's script: PEFT 0.21 adds an adapter's delta at every forward, and older ones train nothing."""
    folder = sources.converted("qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    assert prequant_loader.peft._originals
    adapted = adapt(model, SUFFIXES)
    first = logits(adapted)
    assert torch.equal(logits(adapted), first)
    assert not without_gradient(adapted)

    prequant_loader.peft._restore_peft()
    monkeypatch.setattr(peft, "__version__", "9.0.0")
    with pytest.warns(UserWarning, match="won't train rightly: peft 9.0.0"):
        AutoModelForCausalLM.from_pretrained(folder)
