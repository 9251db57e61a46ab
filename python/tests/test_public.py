"""The public names: the same in both packages, and each in the README."""

from __future__ import annotations

import importlib.metadata
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import prequant
import prequant_loader
import pytest

PYTHON = Path(__file__).resolve().parents[1]
README = (PYTHON / "README.md").read_text(encoding="utf-8")
PROJECT = tomllib.loads((PYTHON / "pyproject.toml").read_text(encoding="utf-8"))


def documented() -> dict[str, str]:
    """The README's table of public names: each with how it is called."""
    table = README.partition("## Public names")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| `(.+?)` \|", table, flags=re.MULTILINE)
    return {re.split(r"[(:]", cell)[0]: cell for cell in cells}


def test_the_readme_has_every_public_name() -> None:
    assert documented().keys() == set(prequant_loader.__all__)


def test_names_are_called_as_the_readme_says() -> None:
    for name, cell in documented().items():
        value = getattr(prequant_loader, name)
        if inspect.isfunction(value) and "(" in cell:
            said = [part.strip(" *").partition("=")[0] for part in cell.partition("(")[2].rstrip(")").split(",")]
            assert [part for part in said if part] == list(inspect.signature(value).parameters), cell


def test_both_packages_have_the_same() -> None:
    assert prequant.__all__ == prequant_loader.__all__ == sorted(prequant_loader.__all__)
    for name in prequant.__all__:
        assert getattr(prequant, name) is getattr(prequant_loader, name), name
        assert name == "__version__" or getattr(prequant, name).__doc__, f"{name} has no docstring"


def test_nothing_public_is_left_out_of_all() -> None:
    """What isn't in `__all__` is a submodule."""
    for package in (prequant, prequant_loader):
        names = {name for name in vars(package) if not name.startswith("_")} - {"annotations"}
        others = {name for name in names - set(package.__all__) if not inspect.ismodule(getattr(package, name))}
        assert not others, others


def test_the_version_is_the_distributions() -> None:
    assert prequant.__version__ == PROJECT["project"]["version"]
    try:
        installed = importlib.metadata.version("prequant-loader")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package isn't installed here, only its source is used")
    assert installed == prequant.__version__


def test_extras_have_no_versions() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    assert {"peft", "axolotl", "unsloth"} <= extras.keys()
    assert all(re.fullmatch(r"[\w-]+", package) for name in extras for package in extras[name])


def test_either_import_is_enough() -> None:
    for package in ("prequant", "prequant_loader"):
        code = f"import {package}; from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as found; print(found['bitsandbytes_4bit'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert "PrequantQuantizer" in done.stdout
