"""Python's verify and prequant's own find the same: tests/convert/mutations.rs does these cases too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import prequant_loader
from conftest import REPOSITORY, convert, in_repository
from mutations import apply
from prequant_loader import PrequantError
from prequant_loader.file_class import is_loaded

FILE = REPOSITORY / "tests/data/mutations.json"
if not FILE.is_file():
    pytest.skip("its cases are in prequant's repository", allow_module_level=True)
TABLE = json.loads(FILE.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """fixtures/tiny-qwen3-moe, converted in each way that the cases need."""
    work = tmp_path_factory.mktemp("mutations")
    for name, flags in TABLE["flags"].items():
        convert(in_repository("fixtures/tiny-qwen3-moe"), work / name, *flags)
    return {name: work / name for name in TABLE["flags"]}


def test_there_are_enough() -> None:
    assert len(TABLE["cases"]) >= 300


@pytest.mark.parametrize("case", TABLE["cases"], ids=lambda case: case["name"])
def test_a_mutation_has_its_class(checkpoints: dict[str, Path], tmp_path: Path, case: dict) -> None:
    folder = tmp_path / "mutated"
    shutil.copytree(checkpoints[case["of"]], folder)
    apply(folder, case["do"])
    found = prequant_loader.differences(folder)
    assert classes(found) == case["class"], found
    if case["class"] == "damage":
        with pytest.raises(PrequantError):
            prequant_loader.verify(folder)
    else:
        assert list(prequant_loader.verify(folder).edited) == found
    if case["class"] == "edited":
        with pytest.raises(PrequantError):
            prequant_loader.verify(folder, strict=True)


def classes(found: list[prequant_loader.Difference]) -> str:
    """The class of all of them."""
    if any(difference.is_damage for difference in found):
        return "damage"
    return "edited" if found else "ok"


def test_files_have_the_class_that_prequant_gives_them() -> None:
    examples = json.loads(in_repository("tests/data/file_classes.json").read_text(encoding="utf-8"))
    assert [path for path in examples["loaded"] if not is_loaded(path)] == []
    assert [path for path in examples["for_people"] if is_loaded(path)] == []
