"""Without the loader, transformers stops at 4-bit experts instead of making up its own.

prequant writes GUARD into config.json for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Sources
from damage import edit_config
from transformers import AutoConfig, AutoModelForCausalLM

NAMES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_vl_moe-hub", "qwen3_5_moe", "llama4"]
GUARD = "prequant_loader"


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("double", [(), ("--double-quant",)], ids=["", "double"])
@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_stops(sources: Sources, name: str, layout: str, double: tuple[str, ...]) -> None:
    folder = sources.converted(name, "--experts", layout, *double)
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match=GUARD):
            sources.model_class(name).from_pretrained(folder, **options)


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", NAMES)
def test_without_the_guard_it_would_stop_later(
    sources: Sources, editable: Callable[..., Path], name: str, layout: str
) -> None:
    """While it loads; 5.14.1 at the first forward, for it doesn't compare the shapes of quantized tensors."""
    folder = editable(name, "--experts", layout)
    edit_config(folder, lambda config: config.pop("experts_implementation"))
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        model = sources.model_class(name).from_pretrained(folder)
        model.train()(torch.arange(3, 20)[None])


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen3_5_moe-hub"])
def test_the_loader_takes_the_guard_and_writes_it(
    sources: Sources, editable: Callable[..., Path], name: str, tmp_path: Path
) -> None:
    guarded, folder = sources.converted(name, "--experts", "fuse"), editable(name, "--experts", "fuse")
    edit_config(folder, lambda config: config.pop("experts_implementation"))
    model, expected = (sources.model_class(name).from_pretrained(path) for path in (guarded, folder))
    tokens = torch.arange(3, 20)[None]
    implementations = [loaded.config.get_text_config()._experts_implementation for loaded in (model, expected)]
    assert implementations[0] == implementations[1] != GUARD
    with torch.no_grad():
        assert torch.equal(model.train()(tokens).logits, expected.train()(tokens).logits)
    model.save_pretrained(tmp_path / "saved")
    assert f'"experts_implementation": "{GUARD}"' in (tmp_path / "saved" / "config.json").read_text()
    sources.model_class(name).from_pretrained(tmp_path / "saved")
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
