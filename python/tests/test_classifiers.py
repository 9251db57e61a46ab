"""Classifiers and reward models are loaded from a language model's 4-bit checkpoint: they make a head of their own, in 16 bits."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import Sources
from transformers import AutoModelForSequenceClassification


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mixtral"])
def test_a_classifier_has_its_own_head_in_16_bits(sources: Sources, name: str) -> None:
    folder = sources.converted(name)
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, output_loading_info=True)
    assert {key for key in info["missing_keys"] if not key.startswith("score.")} == set()
    assert type(model.score) is torch.nn.Linear
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    loss = model.train()(torch.arange(3, 20)[None], labels=torch.tensor([1])).loss
    loss.backward()
    assert model.score.weight.grad is not None and torch.isfinite(loss)
