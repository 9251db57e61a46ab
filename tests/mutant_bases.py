"""The folders that mutants are made of: sources, converted checkpoints, and conversions that were stopped; see mutants.py."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

from crash import STAGING, digests

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
MANIFEST, SUMS = "prequant.json", "SHA256SUMS"
SECONDS = 10
DEFAULT_MEMORY = 256 << 20
"""What prequant promises for so small checkpoints."""


class Wrong(Exception):
    """A promise that wasn't kept."""


@dataclass
class Ran:
    """How a command ended."""

    words: list[str]
    code: int
    out: str
    err: str


@dataclass
class Program:
    """prequant, and where its checkpoints are put."""

    binary: str
    work: Path

    def run(self, words: list[str], memory: int = DEFAULT_MEMORY) -> Ran:
        """Runs prequant; its time and memory are checked here."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen([self.binary, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, "RUST_BACKTRACE": "0"})
            hung: list[bool] = []
            timer = threading.Timer(SECONDS, lambda: (hung.append(True), os.kill(process.pid, signal.SIGKILL)))
            timer.start()
            _, status, usage = os.wait4(process.pid, 0)
            timer.cancel()
            process.returncode = os.waitstatus_to_exitcode(status)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        if hung:
            raise Wrong(f"{words} hangs")
        if usage.ru_maxrss * 1024 > memory:
            raise Wrong(f"{words} takes {usage.ru_maxrss >> 10} MiB of {memory >> 20}: {process.returncode} {texts[1][-500:]}")
        return Ran(words, process.returncode, *texts)

    def must(self, words: list[str]) -> None:
        """Runs what must succeed."""
        ran = self.run(words)
        if ran.code:
            sys.exit(f"{words}: {ran.code}, {ran.err}")


@dataclass
class Base:
    """A folder that mutants are made of."""

    name: str
    folder: Path
    kind: str
    source: Path | None = None
    flags: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    """What was stopped, of a staging folder; or what is run, of a source."""
    expected: dict[str, dict[str, str]] = field(default_factory=dict)
    """The files that each command gives where nothing was changed."""


def make_bases(program: Program) -> list[Base]:
    """The folders that mutants are made of."""
    work = program.work
    victim = work / "victim"
    victim.mkdir()
    (victim / "thesis.tex").write_text("precious\n")
    (victim / "model.safetensors").write_bytes((FIXTURES / "converted-0.1.0/source/model.safetensors").read_bytes())
    tiny, one = FIXTURES / "tiny-qwen3-moe", FIXTURES / "converted-0.1.0/source"
    bases = [
        Base("source in shards", tiny, "source"),
        Base("source in one file", one, "source"),
        Base("source of gpt-oss", FIXTURES / "converted-0.1.0/source-gpt-oss", "source", flags=["--format", "mxfp4", "--layout", "gpt-oss"]),
        Base("source of FP8", make_fp8(work / "fp8"), "source", flags=["--format", "nvfp4"]),
        Base("source of INT4", make_coded(program), "source", flags=["--dequantize-source"]),
    ]
    recipes = {
        "nf4 in shards": (tiny, ["--max-shard-size", "200kB"]),
        "nf4, doubly quantized and fused": (tiny, ["--double-quant", "--experts", "fuse"]),
        "int4": (tiny, ["--format", "int4", "--group-size", "32"]),
        "nvfp4 for ModelOpt": (one, ["--format", "nvfp4", "--layout", "modelopt"]),
        "mxfp4": (one, ["--format", "mxfp4"]),
        "nf4": (tiny, ["--hash-source"]),
    }
    for name, (source, flags) in recipes.items():
        folder = work / name.replace(" ", "-").replace(",", "")
        program.must(["convert", str(source), str(folder), "--quiet", *flags])
        base = Base(name, folder, "converted", source)
        for command in commands_of(base):
            destination = work / "whole"
            program.must([*command[:1], str(folder), str(destination), "--quiet", *command[1:]])
            base.expected[" ".join(command)] = digests(destination)
            shutil.rmtree(destination)
        bases.append(base)
    bases += stopped(program, tiny)
    return bases


def commands_of(base: Base) -> list[list[str]]:
    """What is made of a converted checkpoint."""
    relayout = [["convert", "--experts", "fuse"]] if base.name.startswith("nf4 in") or base.name == "nf4" else []
    return [["dequantize"], *relayout]


def write_safetensors(path: Path, tensors: dict[str, tuple[str, list[int], bytes]]) -> None:
    """A file of weights."""
    header, begin = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + len(data)]}
        begin += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


def make_fp8(folder: Path) -> Path:
    """A checkpoint as DeepSeek-V3 has it: FP8 in blocks of 128 by 128."""
    rng = random.Random("fp8")
    folder.mkdir()
    tensors = {}
    for layer in range(2):
        for part in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{part}.weight"
            tensors[name] = ("F8_E4M3", [256, 128], bytes(byte & 0x77 for byte in rng.randbytes(256 * 128)))
            tensors[f"{name}_scale_inv"] = ("F32", [2, 1], struct.pack("<2f", 0.01, 0.02))
    tensors["model.norm.weight"] = ("BF16", [128], bytes(256))
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "tokenizer.json").write_text("{}\n")
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return folder


def make_coded(program: Program) -> Path:
    """A checkpoint that compressed-tensors has in 4 bits, as prequant writes it."""
    folder = program.work / "int4-source"
    program.must(["convert", str(FIXTURES / "tiny-qwen3-moe"), str(folder), "--quiet", "--format", "int4", "--group-size", "32"])
    (folder / MANIFEST).unlink()
    (folder / SUMS).unlink()
    return folder


def stopped(program: Program, source: Path) -> list[Base]:
    """Conversions that were killed: while they wrote, while they published, and while they replaced another checkpoint."""
    if not shutil.which("strace") or subprocess.run(["strace", "-qq", "-e", "trace=fsync", "true"], check=False).returncode:
        print("strace isn't here, or can't trace: no staging folder is changed")
        return []
    work, old = program.work, program.work / "old"
    program.must(["convert", str(source), str(old), "--quiet", "--format", "fp4"])
    flags = ["--quiet", "--threads", "1", "--max-shard-size", "200kB"]
    bases = []
    for name, start, more, is_there in [
        ("stopped while it wrote", None, [], f"{STAGING}/ready/model-00002-of-*"),
        ("stopped while it published", None, [], "tokenizer.json"),
        ("stopped while it replaced", old, ["--force", "--hash-source"], "tokenizer_config.json"),
    ]:
        folder, whole = work / name.replace(" ", "-"), work / "whole"
        command = ["convert", str(source), "{}", *flags, *more]
        program.must([word.format(whole) for word in command])
        for k in range(1, 200):
            shutil.rmtree(folder, ignore_errors=True)
            if start:
                shutil.copytree(start, folder)
            kill = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=rename", "-e", f"inject=rename:signal=KILL:when={k}"]
            subprocess.run([*kill, program.binary, *(word.format(folder) for word in command)], stderr=subprocess.DEVNULL, check=False)
            if list(folder.glob(is_there)) and not (folder / MANIFEST).exists() and (folder / STAGING).exists():
                break
        else:
            sys.exit(f"{name}: no kill leaves it so")
        bases.append(Base(name, folder, "stopped", source, command=command, expected={"convert": digests(whole)}))
        shutil.rmtree(whole)
    return bases
