"""Checkpoints that the tests share: made once, converted side by side."""

from __future__ import annotations

import os

# Before torch is imported: compiled dequantization would take a minute and gives the same numbers.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import sys
from pathlib import Path

# What is tested is what lies beside the tests, in the processes that they start, too.
SOURCE = str(Path(__file__).resolve().parents[1] / "src")
sys.path.insert(0, SOURCE)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [SOURCE, os.environ.get("PYTHONPATH")]))

import subprocess
from collections.abc import Callable

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import architectures
import prequant_loader

REPOSITORY = Path(__file__).resolve().parents[2]
"""prequant's, unless this is an unpacked sdist."""
PREQUANT = Path(os.environ.get("PREQUANT", REPOSITORY / "target" / "release" / "prequant"))

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(2)


class Sources:
    """Checkpoints in bf16 and what prequant makes of them, each made when it is first asked for."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.classes: dict[str, type[PreTrainedModel]] = {}
        self.made: set[Path] = set()

    def source(self, name: str) -> Path:
        """A checkpoint of architectures.SOURCES."""
        folder = self.work / name / "source"
        if name not in self.classes:
            self.classes[name] = architectures.SOURCES[name](folder)
        return folder

    def model_class(self, name: str) -> type[PreTrainedModel]:
        """The class that it is loaded with."""
        self.source(name)
        return self.classes[name]

    def converted(self, name: str, *flags: str) -> Path:
        """`prequant convert` with these flags, in blocks of the size chosen for it, into several shards."""
        folder = self.work / name / ("converted" + "".join(flags).replace("/", "_"))
        if folder not in self.made:
            block_size = architectures.BLOCK_SIZES.get(name, 64)
            flags += architectures.FLAGS.get(name, ())
            convert(self.source(name), folder, "--block-size", str(block_size), "--max-shard-size", "70KB", *flags)
            self.made.add(folder)
        return folder


def in_repository(path: str) -> Path:
    """A file of prequant's repository; the test is skipped where the package is tested without it."""
    if not (REPOSITORY / "Cargo.toml").is_file():
        pytest.skip(f"it needs {path} of prequant's repository")
    return REPOSITORY / path


def needs_prequant() -> None:
    """Skips the test where the package is tested without prequant. In the repository, or where PREQUANT is set, that is an error."""
    if PREQUANT.is_file():
        return
    if "PREQUANT" not in os.environ and not (REPOSITORY / "Cargo.toml").is_file():
        pytest.skip("it needs prequant: set PREQUANT to the program's path")
    pytest.fail(f"{PREQUANT} does not exist; build it with `cargo build --release`, or set PREQUANT")


def convert(source: Path, folder: Path, *flags: str) -> None:
    """`prequant convert`."""
    needs_prequant()
    command = [PREQUANT, "convert", source, folder, "--quiet", "--device", "cpu", *flags]
    subprocess.run(command, check=True)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """All checkpoints."""
    needs_prequant()
    return Sources(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture
def without_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers as it is, for one test."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "bitsandbytes_4bit", Bnb4BitHfQuantizer)
    original = PreTrainedModel.get_correct_experts_implementation.__wrapped__
    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", original)


@pytest.fixture
def editable(sources: Sources, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a conversion, to damage."""
    import shutil

    def copy(name: str, *flags: str) -> Path:
        return Path(shutil.copytree(sources.converted(name, *flags), tmp_path / "editable"))

    return copy


def hub_snapshot(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *left_out: str) -> Path:
    """A folder as transformers finds it in the hub's cache, as the repository owner/name, without some of its files."""
    import shutil

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = home / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / commit
    shutil.copytree(folder, snapshot, ignore=shutil.ignore_patterns(*left_out))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(home / "hub"), raising=False)
    return snapshot


assert prequant_loader.PrequantQuantizer  # imported for what importing it does
