"""tests/data/mutations.json: changes to converted checkpoints, and what verifying must make of each: ok, edited or damage.

A Rust test (tests/convert/mutations.rs) and a Python one (python/tests/test_mutations.py) make the same changes and verify. The
checkpoints are fixtures/tiny-qwen3-moe, converted as FLAGS say. A change is a list of operations:

    write, append   FILE TEXT           its whole content, or what is put behind it
    flip            FILE AT BIT         one bit; AT is an offset from the file's begin, or from its end if negative
    truncate        FILE LENGTH         to so many bytes; if negative, so many fewer
    remove          FILE
    move, copy      FILE TO
    link            FILE TO             a symbolic link called FILE that leads to TO
    folder          FILE                an empty folder
    replace         FILE FROM TO        the first such text
    set, unset      FILE PATH [VALUE]   a value in JSON, by its keys and numbers
    repeat          FILE PATH           an element of a list in JSON, once more behind it
    lines           FILE HOW            reversed, doubled, crlf or unended
    sums                                SHA256SUMS as prequant.json has it
    seal            [tensors] [more]    prequant.json's sizes and hashes of files (and of tensors; and of files that it doesn't list
                                        yet), and SHA256SUMS, as a forger would put them right

This file is its own reference: what a change means is written here by hand. Run by `scripts/make mutations`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]

FLAGS = {
    "shards": ["--max-shard-size", "200kB"],
    "double": ["--double-quant"],
    "fused": ["--experts", "fuse"],
    "int4": ["--format", "int4", "--group-size", "32"],
}

SHARD = "model-00001-of-00003.safetensors"
LAST_SHARD = "model-00003-of-00003.safetensors"
INDEX = "model.safetensors.index.json"
ONE = "model.safetensors"
MANIFEST, SUMS, CONFIG = "prequant.json", "SHA256SUMS", "config.json"
LISTED_LOADED = [SHARD, LAST_SHARD, INDEX, CONFIG, "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
LISTED_FOR_PEOPLE = ["README.md", "LICENSE"]

Operation = list[Any]


class Table:
    """The cases so far; names are unique."""

    def __init__(self) -> None:
        self.cases: list[dict[str, Any]] = []
        self.names: set[str] = set()

    def add(self, name: str, expected: str, *operations: Operation, of: str = "shards") -> None:
        assert name not in self.names, name
        self.names.add(name)
        self.cases.append({"name": name, "of": of, "class": expected, "do": list(operations)})


def class_of_listed(file: str) -> str:
    return "edited" if file in LISTED_FOR_PEOPLE else "damage"


def unlisted(table: Table) -> None:
    """Files that the manifest doesn't list."""
    classes = json.loads((ROOT / "tests/data/file_classes.json").read_text(encoding="utf-8"))
    there = {*LISTED_LOADED, *LISTED_FOR_PEOPLE, MANIFEST, SUMS}
    for name in classes["loaded"]:
        if name not in there and name not in ("MODEL.SAFETENSORS", "Config.JSON"):  # the same file on some disks
            table.add(f"unlisted {name}", "damage", ["write", name, "x"])
    for name in classes["for_people"]:
        if name not in there and name not in ("readme.MD", "README", "LICENCE"):
            table.add(f"unlisted {name}", "edited", ["write", name, "x"])
    table.add("unlisted empty weights", "damage", ["write", "model-00004-of-00004.safetensors", ""])
    table.add("unlisted copy of a shard", "damage", ["copy", SHARD, ONE])
    table.add("unlisted copy of a shard in a folder", "damage", ["copy", SHARD, "sub/deep/model.safetensors"])
    table.add("unlisted link to a shard", "damage", ["link", ONE, SHARD])
    table.add("unlisted link that leads nowhere", "damage", ["link", "modeling_x.py", "nowhere"])
    table.add("unlisted link to itself", "damage", ["link", "loop.json", "loop.json"])
    table.add("unlisted link to the folder itself", "damage", ["link", "sub", "."])
    table.add("unlisted picture that is a link", "edited", ["link", "x.png", "README.md"])
    table.add("an empty folder", "ok", ["folder", "sub"])
    table.add("an empty folder of code", "ok", ["folder", "code.py"])
    table.add("an empty folder of git", "edited", ["folder", ".git"])
    table.add("a folder of pictures", "edited", ["write", "figures/a.png", "x"], ["write", "figures/b.svg", "x"])
    table.add("a picture and code", "damage", ["write", "figures/a.png", "x"], ["write", "figures/b.py", "x"])
    table.add("a README and an adapter", "damage", ["append", "README.md", "x"], ["write", "adapter_config.json", "{}"])


def content(table: Table) -> None:
    """Bytes of listed files."""
    for file in LISTED_LOADED + LISTED_FOR_PEOPLE:
        expected = class_of_listed(file)
        for at, bit in ((0, 0), (9, 1), (300, 5), (-300, 3), (-1, 0)):
            if file not in ("generation_config.json", "LICENSE") or abs(at) != 300:
                table.add(f"{file}: bit {bit} of byte {at}", expected, ["flip", file, at, bit])
        table.add(f"{file}: a byte more", expected, ["append", file, " "])
        table.add(f"{file}: a byte less", expected, ["truncate", file, -1])
        table.add(f"{file}: empty", expected, ["truncate", file, 0])
        table.add(f"{file}: missing", expected, ["remove", file])
    for file in LISTED_LOADED:
        table.add(f"{file}: under another name", "damage", ["move", file, f"old_{file}"])
    table.add("README.md under another name", "edited", ["move", "README.md", "MODEL_CARD.md"])
    table.add("LICENSE as LICENSE.py", "damage", ["move", "LICENSE", "LICENSE.py"])
    table.add("two shards exchanged", "damage", ["move", SHARD, "x"], ["move", LAST_SHARD, SHARD], ["move", "x", LAST_SHARD])
    table.add("a folder in place of tokenizer.json", "damage", ["remove", "tokenizer.json"], ["folder", "tokenizer.json"])
    table.add("a folder in place of README.md", "edited", ["remove", "README.md"], ["folder", "README.md"])
    table.add("a file in place of the same file by a link", "edited", ["move", "README.md", "b.md"], ["link", "README.md", "b.md"])
    for at in (1000, 5000, 20000, 60000, -40, -4000, -20000):
        table.add(f"double: bit of byte {at}", "damage", ["flip", ONE, at, 4], of="double")
        table.add(f"fused: bit of byte {at}", "damage", ["flip", ONE, at, 6], of="fused")
        table.add(f"int4: bit of byte {at}", "damage", ["flip", ONE, at, 7], of="int4")


def sums(table: Table) -> None:
    """SHA256SUMS."""
    table.add("sums missing", "damage", ["remove", SUMS])
    table.add("sums empty", "damage", ["truncate", SUMS, 0])
    for how in ("reversed", "doubled", "crlf", "unended"):
        table.add(f"sums {how}", "damage", ["lines", SUMS, how])
    # The first line is LICENSE's, the last the tokenizer's.
    for at, expected in ((0, "edited"), (70, "damage"), (-1, "damage"), (-2, "damage"), (-100, "damage")):
        table.add(f"sums: bit of byte {at}", expected, ["flip", SUMS, at, 2])
    digest = "0" * 64
    for file, expected in (
        (".gitattributes", "edited"),
        ("figures/a.png", "edited"),
        ("x.py", "damage"),
        ("adapter_model.bin", "damage"),
    ):
        table.add(f"sums with a line of {file}", expected, ["append", SUMS, f"{digest}  {file}\n"])
    table.add("sums with a line that is none", "damage", ["append", SUMS, "x\n"])
    table.add("sums without a name of README.md", "damage", ["replace", SUMS, "  README.md", "  README.mp"])
    table.add("sums in capitals", "edited", ["replace", SUMS, "a", "A"])


def manifest(table: Table) -> None:
    """prequant.json, first as it is changed by accident, then with sums put right."""
    table.add("manifest: not JSON", "damage", ["write", MANIFEST, "x"])
    table.add("manifest: an empty object", "damage", ["write", MANIFEST, "{}"])
    table.add("manifest: half of it", "damage", ["truncate", MANIFEST, 20000])
    table.add("manifest: a list", "damage", ["write", MANIFEST, "[]"], ["seal"])
    table.add("manifest: a byte more", "damage", ["append", MANIFEST, "\n"])
    for at in (100, 5000, -5000, -3):
        table.add(f"manifest: bit of byte {at}", "damage", ["flip", MANIFEST, at, 0])
    table.add("manifest: sealed again as it is", "ok", ["seal"])
    table.add("manifest: written otherwise and sealed", "ok", ["append", MANIFEST, "\n\n"], ["seal"])

    def sealed(name: str, expected: str, *operations: Operation, of: str = "shards") -> None:
        table.add(f"sealed: {name}", expected, *operations, ["seal"], of=of)

    def setting(path: list[Any], value: Any, expected: str = "damage", of: str = "shards") -> None:
        name = f"{'.'.join(map(str, path))} is {value!r} in {of}"
        sealed(name, expected, ["set", MANIFEST, path, value], of=of)

    for key in ("quantized_tensors", "kept_tensors", "quantized_elements", "kept_elements"):
        setting(["summary", key], 7)
    for key in ("bits_per_quantized_weight", "bits_per_weight"):
        setting(["summary", key], 1.0)
        setting(["summary", key], 4.0, of="int4")
    statistics = ["summary", "statistics"]
    for key, value in (("blocks", 1), ("zero_blocks", 5), ("nonfinite_blocks", 9999), ("relative_squared_error", 1e-12)):
        setting([*statistics, key], value)
        setting([*statistics, key], value, of="fused")
    for key, value in (("snr_db", 99.0), ("snr_db", None), ("max_absolute_error", 0.0), ("max_absolute_error", 9.0)):
        setting([*statistics, key], value)
    for key, value in (("min", 0.0), ("max", 100.0), ("mean", 50.0), ("mean", 0.0)):
        setting([*statistics, "absmax", key], value)
    for key in ("schema_version", "tool", "recipe", "source", "summary", "files", "tensors"):
        table.add(f"sealed: no {key}", "damage", ["unset", MANIFEST, [key]], ["lines", SUMS, "reversed"])
    setting(["schema_version"], 3)
    setting(["schema_version"], "2")
    setting(["recipe", "block_size"], 128)
    setting(["recipe", "block_size"], 63)
    setting(["recipe", "double_quant"], True)
    setting(["recipe", "double_quant"], False, of="double")
    setting(["recipe", "format"], "fp4")
    setting(["recipe", "format"], "nf5")
    setting(["source", "files", 0, "header_sha256"], "x")
    setting(["source", "model_type"], "llama", expected="ok")
    setting(["tensors", 0, "reason"], "because", expected="ok")
    setting(["tensors", 0, "decision"], "quantize")
    setting(["tensors", 0, "decision"], "perhaps")
    for path, value in (
        (["name"], "lm_head.weigth"),
        (["file"], LAST_SHARD),
        (["file"], "nowhere.safetensors"),
        (["dtype"], "F16"),
        (["shape"], [128, 384]),
        (["shape"], [384, 129]),
        (["sha256"], "0" * 64),
        (["sha256"], "0"),
    ):
        setting(["tensors", 0, "outputs", 0, *path], value)
    sealed("a tensor without its record", "damage", ["unset", MANIFEST, ["tensors", 3]])
    sealed("a record twice", "damage", ["repeat", MANIFEST, ["tensors", 3]])
    for i, expected in ((0, "edited"), (1, "edited"), (2, "damage"), (4, "damage"), (7, "damage"), (8, "damage")):
        sealed(f"file {i} not listed", expected, ["unset", MANIFEST, ["files", i]])
        sealed(f"file {i} listed twice", "damage", ["repeat", MANIFEST, ["files", i]])
        table.add(f"file {i} with another hash", expected, ["set", MANIFEST, ["files", i, "sha256"], "1" * 64], ["sums"])
        table.add(f"file {i} with another size", expected, ["set", MANIFEST, ["files", i, "size"], 12345], ["sums"])
    sealed("a file outside", "damage", ["set", MANIFEST, ["files", 2, "name"], "../config.json"])
    sealed("a file at the root", "damage", ["set", MANIFEST, ["files", 2, "name"], "/etc/hostname"])
    sealed("a file that isn't there", "damage", ["set", MANIFEST, ["files", 2, "name"], "confi.json"])


def forged(table: Table) -> None:
    """Files changed, with everything put right that a hash tells."""
    table.add("README.md edited and sealed", "ok", ["append", "README.md", "more"], ["seal"])
    table.add("tokenizer.json edited and sealed", "ok", ["append", "tokenizer.json", " "], ["seal"])
    table.add("an adapter listed and sealed", "ok", ["write", "adapter_config.json", "{}"], ["seal", "more"])
    for file in ("adapter_model.safetensors", "mtp.safetensors", "model_extra.safetensors", "voices.bin", "modeling_x.py", "chat_template.jinja"):
        table.add(f"{file} listed and sealed", "ok", ["write", file, "x"], ["seal", "more"])
    for file in (ONE, "model-00009-of-00009.safetensors", "model.fp16.safetensors", "consolidated.safetensors", "diffusion_pytorch_model.safetensors",
                 "diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-00001-of-00001.bin",
                 "consolidated.00.pth", "model.pt", "tf_model.h5"):  # fmt: skip
        table.add(f"{file} listed and sealed", "damage", ["write", file, "x"], ["seal", "more"])
    table.add("config.json edited and sealed", "ok", ["replace", CONFIG, "1e-06", "1e-01"], ["seal"])

    def config(path: list[str], value: Any, expected: str = "damage", of: str = "shards") -> None:
        name = f"config.json's {'.'.join(path)} is {value!r} in {of}, sealed"
        table.add(name, expected, ["set", CONFIG, path, value], ["seal"], of=of)

    quantization = "quantization_config"
    for key, value in (
        ("quant_method", "gptq"),
        ("load_in_4bit", False),
        ("load_in_8bit", True),
        ("bnb_4bit_quant_type", "fp4"),
        ("bnb_4bit_use_double_quant", True),
        ("bnb_4bit_quant_storage", "bfloat16"),
        ("llm_int8_skip_modules", ["lm_head", "model.layers.0.self_attn.q_proj"]),
        ("llm_int8_skip_modules", ["q_proj"]),
    ):
        config([quantization, key], value)
    config([quantization, "bnb_4bit_compute_dtype"], "float16", expected="ok")
    config([quantization, "bnb_4bit_use_double_quant"], False, of="double")
    config([quantization, "bnb_4bit_quant_type"], "fp4", of="fused")
    config([quantization], 4)
    table.add("config.json without quantization_config, sealed", "damage", ["unset", CONFIG, [quantization]], ["seal"])
    table.add("config.json that isn't JSON, sealed", "damage", ["write", CONFIG, "{"], ["seal"])
    table.add("config.json that is a list, sealed", "damage", ["write", CONFIG, "[]"], ["seal"])

    table.add("the index's total_size, sealed", "damage", ["set", INDEX, ["metadata", "total_size"], 1], ["seal"])
    table.add("the index's metadata, sealed", "damage", ["set", INDEX, ["metadata", "more"], 1], ["seal"])
    table.add("an index of more, sealed", "damage", ["set", INDEX, ["weight_map", "x"], SHARD], ["seal"])
    table.add("an index with another file, sealed", "damage", ["set", INDEX, ["weight_map", "lm_head.weight"], LAST_SHARD], ["seal"])
    table.add("an index of less, sealed", "damage", ["unset", INDEX, ["weight_map", "lm_head.weight"]], ["seal"])
    table.add("an index with other keys, sealed", "damage", ["set", INDEX, ["auto_map"], {}], ["seal"])
    table.add("an index with spaces, sealed", "damage", ["append", INDEX, " "], ["seal"])
    table.add("an index that isn't JSON, sealed", "damage", ["write", INDEX, "x"], ["seal"])

    for at in (-1, -2000, -60000):
        table.add(f"weights: byte {at}, files sealed", "damage", ["flip", SHARD, at, 1], ["seal"])
        table.add(f"weights: byte {at}, tensors sealed", "ok", ["flip", SHARD, at, 1], ["seal", "tensors"])
    table.add("a quant_state of other blocks, sealed", "damage", ["replace", LAST_SHARD, '"blocksize": 64', '"blocksize": 32'], ["seal", "tensors"])
    table.add("a quant_state of another format, sealed", "damage", ["replace", LAST_SHARD, '"quant_type": "nf4"', '"quant_type": "fp4"'], ["seal", "tensors"])
    table.add("a quant_state of another dtype, sealed", "damage", ["replace", LAST_SHARD, '"dtype": "bfloat16"', '"dtype": "float16" '], ["seal", "tensors"])
    table.add("a quant_state of another shape, sealed", "damage", ["replace", LAST_SHARD, '"shape": [', '"shape": [1'], ["seal", "tensors"])
    table.add("a quant_state that isn't JSON, sealed", "damage", ["replace", LAST_SHARD, '{"quant_type"', '["quant_type"'], ["seal", "tensors"])
    table.add("a double quant_state without its offset, sealed", "damage", ["replace", ONE, '"nested_offset"', '"nested_offsot"'], ["seal", "tensors"], of="double")
    table.add("a tensor renamed in its header, sealed", "damage", ["replace", SHARD, '"lm_head.weight"', '"lm_heed.weight"'], ["seal"])
    table.add("a tensor of another dtype in its header, sealed", "damage", ["replace", SHARD, '"BF16"', '"F16" '], ["seal"])
    table.add("a header that isn't JSON, sealed", "damage", ["flip", SHARD, 8, 1], ["seal"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    table = Table()
    for part in (unlisted, content, sums, manifest, forged):
        part(table)
    cases = ",\n".join(f"    {json.dumps(case)}" for case in table.cases)
    flags = json.dumps(FLAGS)
    parser.parse_args().out.write_text(f'{{\n  "flags": {flags},\n  "cases": [\n{cases}\n  ]\n}}\n', encoding="utf-8")
    print(f"{len(table.cases)} cases")


if __name__ == "__main__":
    main()
