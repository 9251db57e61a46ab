"""`model.dequantize()` gives an ordinary model: what it saves, transformers loads without this package."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import Sources
from test_loading import logits, parametrized


@pytest.mark.parametrize("layout", ["keep", "fuse"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "granitemoe", "llama4", "llama"])
def test_experts_are_decoded_too(sources: Sources, name: str, layout: str, tmp_path: Path) -> None:
    folder = sources.converted(name, "--experts", layout)
    model = sources.model_class(name).from_pretrained(folder)
    decoded = {key: getattr(*place).clone() for key, place in parametrized(model).items()}
    before = logits(model)
    model = model.dequantize()
    assert not parametrized(model)
    assert not any(isinstance(module, Linear4bit) for module in model.modules())
    parameters = dict(model.named_parameters())
    for key, value in decoded.items():
        assert torch.equal(parameters[key], value), key
    # bitsandbytes' Linears compute otherwise than torch's.
    torch.testing.assert_close(logits(model).float(), before.float(), rtol=0.05, atol=0.05)

    model.save_pretrained(tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert "quantization_config" not in config and "experts_implementation" not in config
    loaded, info = sources.model_class(name).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits(loaded), logits(model))
