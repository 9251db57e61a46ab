"""Installing by import, by call and for a block, and taking it back."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Sources
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

import prequant_loader

KEY = "bitsandbytes_4bit"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    prequant_loader.install()


def loads(folder: Path) -> bool:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except ValueError as error:
        assert "prequant_loader" in str(error)
        return False
    return True


def test_it_is_taken_back_and_put_in_again(sources: Sources) -> None:
    folder = sources.converted("qwen3_moe", "--guard", "strict")
    assert loads(folder)
    for _ in range(2):
        prequant_loader.uninstall()
        assert AUTO_QUANTIZER_MAPPING[KEY] is Bnb4BitHfQuantizer
        assert not hasattr(PreTrainedModel.get_correct_experts_implementation, "accepts_guard")
    assert not loads(folder)
    prequant_loader.install()
    prequant_loader.install()
    assert loads(folder)


def test_it_can_be_had_for_a_block(sources: Sources) -> None:
    folder = sources.converted("qwen3_moe", "--guard", "strict")
    prequant_loader.uninstall()
    with prequant_loader.installed(), prequant_loader.installed():
        assert loads(folder)
    assert not loads(folder)
    with pytest.raises(KeyError), prequant_loader.installed():
        raise KeyError
    assert AUTO_QUANTIZER_MAPPING[KEY] is Bnb4BitHfQuantizer
    prequant_loader.install()
    with prequant_loader.installed():
        pass
    assert AUTO_QUANTIZER_MAPPING[KEY] is prequant_loader.PrequantQuantizer


def test_another_packages_quantizer_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other(Bnb4BitHfQuantizer):
        pass

    prequant_loader.uninstall()
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, KEY, Other)
    with prequant_loader.installed():
        assert AUTO_QUANTIZER_MAPPING[KEY] is prequant_loader.PrequantQuantizer
    assert AUTO_QUANTIZER_MAPPING[KEY] is Other
    prequant_loader.install()
    AUTO_QUANTIZER_MAPPING[KEY] = Bnb4BitHfQuantizer  # by somebody else, since
    prequant_loader.uninstall()
    assert AUTO_QUANTIZER_MAPPING[KEY] is Bnb4BitHfQuantizer


def test_a_variant_of_the_quantizer_is_put_back() -> None:
    """As axolotl's staged loading has one."""

    class Variant(prequant_loader.PrequantQuantizer):
        pass

    prequant_loader.quantizer.install_quantizer(Variant)
    with prequant_loader.installed():
        assert AUTO_QUANTIZER_MAPPING[KEY] is prequant_loader.PrequantQuantizer
    assert AUTO_QUANTIZER_MAPPING[KEY] is Variant
    prequant_loader.uninstall()
    assert AUTO_QUANTIZER_MAPPING[KEY] is Bnb4BitHfQuantizer
    prequant_loader.install()


def test_importing_installs() -> None:
    code = (
        "import prequant_loader\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "print(AUTO_QUANTIZER_MAPPING['bitsandbytes_4bit'].__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "PrequantQuantizer"
