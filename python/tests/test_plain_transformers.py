"""Without the loader, transformers stops at 4-bit experts instead of making up its own.

By itself, at their shapes; with `--guard strict` before that, whatever it is told to ignore.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import Sources
from transformers import AutoConfig, AutoModelForCausalLM

NAMES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_vl_moe-hub", "qwen3_5_moe", "llama4"]
GUARD = "prequant_loader"


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", NAMES)
def test_with_the_guard_it_stops_whatever_it_is_told_to_ignore(sources: Sources, name: str, layout: str) -> None:
    folder = sources.converted(name, "--experts", layout, "--guard", "strict")
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=GUARD):
            sources.model_class(name).from_pretrained(folder, **options)


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("double", [(), ("--double-quant",)], ids=["", "double"])
@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_stops(sources: Sources, name: str, layout: str, double: tuple[str, ...]) -> None:
    """While it loads; 5.14.1 at the first forward, for it doesn't compare the shapes of quantized tensors."""
    folder = sources.converted(name, "--experts", layout, *double)
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        model = sources.model_class(name).from_pretrained(folder)
        model.train()(torch.arange(3, 20)[None])


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("name", NAMES)
def test_a_model_without_weights_is_made_from_the_config(sources: Sources, name: str) -> None:
    """As accelerate's init_empty_weights, estimators of memory and vLLM's own backend for transformers do."""
    config = AutoConfig.from_pretrained(sources.converted(name))
    with torch.device("meta"):
        sources.model_class(name)._from_config(config)


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe-hub"])
def test_the_loader_takes_the_guard_and_writes_it(sources: Sources, name: str, tmp_path: Path) -> None:
    guarded = sources.converted(name, "--experts", "fuse", "--guard", "strict")
    folder = sources.converted(name, "--experts", "fuse")
    model, expected = (sources.model_class(name).from_pretrained(path) for path in (guarded, folder))
    tokens = torch.arange(3, 20)[None]
    implementations = [loaded.config.get_text_config()._experts_implementation for loaded in (model, expected)]
    assert implementations[0] == implementations[1] != GUARD
    with torch.no_grad():
        assert torch.equal(model.train()(tokens).logits, expected.train()(tokens).logits)
    model.save_pretrained(tmp_path / "saved")
    assert f'"experts_implementation": "{GUARD}"' in (tmp_path / "saved" / "config.json").read_text()
    sources.model_class(name).from_pretrained(tmp_path / "saved")
    expected.save_pretrained(tmp_path / "without")
    assert "experts_implementation" not in json.loads((tmp_path / "without" / "config.json").read_text())
    sources.model_class(name).from_pretrained(guarded, experts_implementation="eager")


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("name", NAMES)
def test_the_config_alone_is_read_without_the_loader(sources: Sources, name: str) -> None:
    """Tokenizers, PEFT and other clients read no more than that."""
    folder = sources.converted(name)
    assert AutoConfig.from_pretrained(folder).model_type == json.loads((folder / "config.json").read_text())["model_type"]


@pytest.mark.usefixtures("without_loader")
def test_transformers_alone_loads_dense_models(sources: Sources) -> None:
    folder = sources.converted("llama")
    assert "experts_implementation" not in json.loads((folder / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(folder)
