"""Without the loader, transformers stops at 4-bit experts instead of making up its own."""

from __future__ import annotations

import pytest
from conftest import Sources
from transformers import AutoModelForCausalLM

NAMES = ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss", "granitemoe", "qwen3_vl_moe-hub", "qwen3_5_moe", "llama4"]


@pytest.mark.usefixtures("without_loader")
@pytest.mark.parametrize("double", [(), ("--double-quant",)], ids=["", "double"])
@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", NAMES)
def test_transformers_alone_stops(sources: Sources, name: str, layout: str, double: tuple[str, ...]) -> None:
    with pytest.raises((RuntimeError, ValueError)):
        sources.model_class(name).from_pretrained(sources.converted(name, "--experts", layout, *double))


@pytest.mark.usefixtures("without_loader")
def test_transformers_alone_loads_dense_models(sources: Sources) -> None:
    AutoModelForCausalLM.from_pretrained(sources.converted("llama"))
