"""The manifest is checked on request: by a call, or on every load if PREQUANT_VERIFY is 1."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import PREQUANT, Sources, convert, hub_snapshot, in_repository
from mutations import apply
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import prequant_loader
from prequant_loader import PrequantError
from prequant_loader.layout import read_header

GROUPS = {
    "int4": ["--format", "int4", "--group-size", "32"],
    "int4-asym": ["--format", "int4-asym", "--group-size", "64"],
    "channel": ["--format", "int4", "--group-size", "channel"],
    "nvfp4": ["--format", "nvfp4"],
    "modelopt": ["--format", "nvfp4", "--layout", "modelopt"],
    "mxfp4": ["--format", "mxfp4"],
}


@pytest.mark.parametrize("layout", ["keep", "fuse"])
def test_what_prequant_writes_is_verified(sources: Sources, layout: str) -> None:
    folder = sources.converted("qwen3_moe", "--experts", layout)
    verified = prequant_loader.verify(folder)
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("prequant.json", "SHA256SUMS")]
    assert (verified.files, verified.size) == (len(files), sum(path.stat().st_size for path in files))
    assert prequant_loader.verify(str(folder)) == verified


@pytest.mark.parametrize("flags", [[], ["--format", "nf4"]])
def test_what_an_adapter_was_merged_into_is_verified(sources: Sources, tmp_path: Path, flags: list[str]) -> None:
    base, adapter, folder = sources.source("qwen3_moe"), tmp_path / "adapter", tmp_path / "merged"
    module = "model.layers.0.self_attn.q_proj"
    weights = AutoModelForCausalLM.from_pretrained(base).get_parameter(f"{module}.weight")
    rows, columns = weights.shape
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    prefix = f"base_model.model.{module}"
    factors = {f"{prefix}.lora_A.weight": torch.ones(2, columns), f"{prefix}.lora_B.weight": torch.ones(rows, 2)}
    save_file(factors, adapter / "adapter_model.safetensors")
    subprocess.run([PREQUANT, "merge", base, adapter, folder, "--quiet", *flags], check=True)
    assert prequant_loader.verify(folder).files > 1
    config = json.loads((folder / "config.json").read_text())
    if not flags:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
        with pytest.raises(PrequantError, match="nothing is quantized"):
            prequant_loader.verify(folder)


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["config.json", "model-00001-of-*.safetensors", "model.safetensors.index.json"])
def test_a_flipped_bit_is_found(editable: Callable[..., Path], file: str) -> None:
    folder = editable("qwen3_moe")
    (path,) = folder.glob(file)
    flip_last_byte(path)
    with pytest.raises(PrequantError, match=f"{path.name}.*SHA-256"):
        prequant_loader.verify(folder)


def damage_codes(folder: Path) -> None:
    """Flips a bit that only a hash can tell: two weights have other codes."""
    tensors = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in read_header(file).items()}
    codes = tensors["model.layers.0.mlp.experts.0.up_proj.weight"]
    content = bytearray(codes.path.read_bytes())
    content[codes.offset] ^= 1
    codes.path.write_bytes(content)


def test_missing_longer_and_shorter_files_are_found(editable: Callable[..., Path]) -> None:
    folder = editable("qwen3_moe")
    path = folder / "config.json"
    content = path.read_bytes()
    for changed in (content + b" ", content[:-1]):
        path.write_bytes(changed)
        with pytest.raises(PrequantError, match=r"config\.json.* bytes"):
            prequant_loader.verify(folder)
    path.unlink()
    with pytest.raises(PrequantError, match=r"config\.json.*does not exist"):
        prequant_loader.verify(folder)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"schema_version": 3}, "schema_version"),
        ({"schema_version": None}, "schema_version"),
        ({"files": [{"name": "../secret", "size": 1, "sha256": ""}]}, "own folder"),
        ({"files": [{}]}, "can't be read"),
    ],
)
def test_a_manifest_that_isnt_one(editable: Callable[..., Path], change: dict, word: str) -> None:
    path = editable("qwen3_moe") / "prequant.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PrequantError, match=word):
        prequant_loader.verify(path.parent)


def test_a_folder_without_manifest(sources: Sources) -> None:
    with pytest.raises(PrequantError, match=r"prequant\.json.*does not exist"):
        prequant_loader.verify(sources.source("qwen3_moe"))


def test_loading_verifies_if_asked(editable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = editable("qwen3_moe")
    monkeypatch.setenv("PREQUANT_VERIFY", "1")
    AutoModelForCausalLM.from_pretrained(folder)
    damage_codes(folder)
    with pytest.raises(PrequantError, match="SHA-256"):
        AutoModelForCausalLM.from_pretrained(folder)
    monkeypatch.setenv("PREQUANT_VERIFY", "0")
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "adapter_config.json", "modeling_x.py"])
def test_loading_takes_nothing_that_wasnt_verified(
    editable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """transformers prefers one file to shards, and takes an adapter because it is there."""
    folder = editable("qwen3_moe")
    assert not (folder / name).exists()
    monkeypatch.setenv("PREQUANT_VERIFY", "1")
    AutoModelForCausalLM.from_pretrained(folder)
    (folder / name).write_bytes(next(folder.glob("*.safetensors")).read_bytes() if name.endswith(".safetensors") else b"{}")
    with pytest.raises(PrequantError, match=re.escape(name)):
        prequant_loader.verify(folder)
    if name != "adapter_config.json":  # which transformers reads before anything else
        with pytest.raises(PrequantError, match=re.escape(name)):
            AutoModelForCausalLM.from_pretrained(folder)


def test_what_no_client_loads_may_be_edited(editable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = editable("qwen3_moe")
    (folder / "README.md").write_text("more")
    (folder / ".git").mkdir()
    assert [difference.file for difference in prequant_loader.verify(folder).edited] == [".git/", "README.md"]
    with pytest.raises(PrequantError, match=r"\.git: "):
        prequant_loader.verify(folder, strict=True)
    monkeypatch.setenv("PREQUANT_VERIFY", "1")
    AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("flags", GROUPS.values(), ids=GROUPS.keys())
def test_config_says_what_the_recipe_does_in_formats_with_groups(tmp_path: Path, flags: list[str]) -> None:
    """A config that manifest and SHA256SUMS vouch for is found too, whatever of it is changed."""
    folder = tmp_path / "converted"
    convert(in_repository("fixtures/tiny-qwen3-moe"), folder, *flags)
    prequant_loader.verify(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    quantization = json.loads(before["config.json"])["quantization_config"]
    decided = sorted(quantization.keys() - {"ignore", "producer"})
    assert "quant_method" in decided
    for path in [[key] for key in decided] + [["config_groups", next(iter(quantization["config_groups"])), "weights", "group_size"]]:
        apply(folder, [["set", "config.json", ["quantization_config", *path], "other"], ["seal"]])
        with pytest.raises(PrequantError, match=f"config.json.*{path[0]}"):
            prequant_loader.verify(folder)
        for name, content in before.items():
            (folder / name).write_bytes(content)
    quantized = "model.layers.0.self_attn.q_proj"
    apply(folder, [["set", "config.json", ["quantization_config", "ignore", 0], quantized], ["seal"]])
    with pytest.raises(PrequantError, match=f"config.json.*{quantized}"):
        prequant_loader.verify(folder)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "", "[]", "\ufeff{}"])
def test_a_config_that_isnt_one_is_found(editable: Callable[..., Path], text: str) -> None:
    folder = editable("qwen3_moe")
    (folder / "config.json").write_text(text)
    apply(folder, [["seal"]])
    with pytest.raises(PrequantError, match=r"config\.json.*not a model's config"):
        prequant_loader.verify(folder)


@pytest.mark.parametrize("name", ["config.json", "SHA256SUMS", "tokenizer.json"])
def test_pipes_are_found_and_not_waited_for(editable: Callable[..., Path], name: str) -> None:
    folder = editable("qwen3_moe")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(PrequantError, match=name):
        prequant_loader.verify(folder)


@pytest.mark.parametrize("name", ["prequant.json", "SHA256SUMS", "config.json", "model.safetensors.index.json"])
def test_what_cant_be_looked_at_isnt_taken_for_missing(
    editable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    folder = editable("qwen3_moe")
    stat = Path.stat

    def failing(path: Path, **options: bool) -> os.stat_result:
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", failing)
    monkeypatch.setenv("PREQUANT_VERIFY", "1")
    with pytest.raises(OSError, match=re.escape(name)):
        prequant_loader.verify(folder)
    with pytest.raises(OSError, match=re.escape(name)):
        AutoModelForCausalLM.from_pretrained(folder)


SIDE_FILES = ("README.md", "SHA256SUMS", "generation_config.json")
"""What transformers doesn't download, or not always."""


@pytest.mark.parametrize("left_out", [SIDE_FILES, (*SIDE_FILES, "prequant.json")])
def test_what_was_downloaded_is_verified(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left_out: tuple[str, ...]
) -> None:
    """transformers downloads weights, index and config; the manifest is fetched, and none is said to be missing."""
    folder = sources.converted("qwen3_moe")
    snapshot = hub_snapshot(tmp_path, folder, monkeypatch, *left_out)
    monkeypatch.setenv("PREQUANT_VERIFY", "1")
    if "prequant.json" in left_out:
        with pytest.warns(UserWarning, match="nothing was verified"):
            AutoModelForCausalLM.from_pretrained("owner/name")

        def fetch(name: str, file: str, revision: str, **options: object) -> str:
            assert (name, file, revision) == ("owner/name", "prequant.json", snapshot.name)
            shutil.copy(folder / file, snapshot / file)
            return str(snapshot / file)

        monkeypatch.setattr(sys.modules["prequant_loader.verify"], "cached_file", fetch)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(verified|edited since)")
        AutoModelForCausalLM.from_pretrained("owner/name")
    damage_codes(snapshot)
    with pytest.raises(PrequantError, match="SHA-256"):
        AutoModelForCausalLM.from_pretrained("owner/name")


def test_loading_says_what_was_edited(editable: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = editable("qwen3_moe")
    (folder / "README.md").write_text("more")
    monkeypatch.setenv("PREQUANT_VERIFY", "1")
    with pytest.warns(UserWarning, match=r"edited since: README\.md$"):
        AutoModelForCausalLM.from_pretrained(folder)
    (folder / "README.md").unlink()
    AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_bytes(b"{}")
    with pytest.raises((PrequantError, KeyError, OSError)):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_repository_on_the_hub_is_verified(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sources.converted("qwen3_moe")
    snapshot = hub_snapshot(tmp_path, folder, monkeypatch)
    assert prequant_loader.verify("owner/name") == prequant_loader.verify(folder)
    assert prequant_loader.verify("owner/name", revision="main") == prequant_loader.verify(folder)
    (snapshot / ".gitattributes").write_text("*.safetensors filter=lfs diff=lfs merge=lfs -text\n")  # the hub's own
    assert [each.file for each in prequant_loader.differences("owner/name")] == [".gitattributes"]
    damage_codes(snapshot)
    with pytest.raises(PrequantError, match="safetensors"):
        prequant_loader.verify("owner/name")


def test_a_folder_of_a_repositorys_name_comes_first(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(sources.converted("qwen3_moe"), tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)
    prequant_loader.verify("owner/name")


@pytest.mark.parametrize("revision", [None, "no-such-branch"])
def test_what_is_neither_here_nor_on_the_hub_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PrequantError, match="^owner/name: no such folder is here, and the hub doesn't give it.*check the name"):
        prequant_loader.verify("owner/name", revision=revision)
    with pytest.raises(PrequantError, match="owner.name"):
        prequant_loader.verify(tmp_path / "owner" / "name")
