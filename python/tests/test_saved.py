"""Checkpoints that transformers and bitsandbytes wrote themselves are read by `prequant`, which has no manifest of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from conftest import PREQUANT, Sources
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel


def dequantize(folder: Path, out: Path) -> None:
    subprocess.run([PREQUANT, "dequantize", folder, out, "--quiet"], check=True)


def test_what_quantizing_on_load_saved_decodes_as_bitsandbytes_decodes_it(sources: Sources, tmp_path: Path) -> None:
    for quant_type, double in [("nf4", False), ("fp4", True)]:
        options = {"bnb_4bit_quant_type": quant_type, "bnb_4bit_use_double_quant": double}
        config = BitsAndBytesConfig(load_in_4bit=True, **options)
        model = AutoModelForCausalLM.from_pretrained(sources.source("llama"), quantization_config=config)
        saved, decoded = tmp_path / quant_type, tmp_path / f"{quant_type}-decoded"
        model.save_pretrained(saved)
        dequantize(saved, decoded)
        found = AutoModelForCausalLM.from_pretrained(decoded)
        modules = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        assert modules
        for name, module in modules.items():
            expected = dequantize_4bit(module.weight.data, module.weight.quant_state)
            assert torch.equal(found.get_submodule(name).weight, expected), name


@pytest.mark.parametrize("layout", ["keep", "fuse"])
def test_what_the_loader_saved_decodes_as_what_it_was_loaded_from(sources: Sources, tmp_path: Path, layout: str) -> None:
    converted = sources.converted("qwen3_moe", "--experts", layout)
    sources.model_class("qwen3_moe").from_pretrained(converted).save_pretrained(tmp_path / "saved")
    dequantize(tmp_path / "saved", tmp_path / "decoded")
    dequantize(converted, tmp_path / "expected")

    def load(folder: Path) -> PreTrainedModel:
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(info.values()), info
        return model

    found, expected = load(tmp_path / "decoded"), load(tmp_path / "expected")
    for name, parameter in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), parameter), name
