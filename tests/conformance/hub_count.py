"""Compares the parameters that `prequant inspect` says the hub's pages show with what the hub's own code counts.

For every format and layout that prequant writes, of small models, and for what they were made from. The code is npm's
`@huggingface/hub`, of the version in hub/package-lock.json, which `npm ci` installs; nothing is asked of the hub.

    scripts/conformance hub
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

FORMATS = [
    ["--format", "nf4"], ["--format", "nf4", "--double-quant", "--experts", "fuse"], ["--format", "fp4"],
    ["--format", "int4", "--group-size", "32"], ["--format", "int4-asym", "--group-size", "32"],
    ["--format", "int4", "--group-size", "32", "--exclude", "self_attn"], ["--format", "nvfp4"],
    ["--format", "nvfp4", "--layout", "modelopt"], ["--format", "mxfp4"],
]
OF_GPT_OSS = [["--format", "mxfp4", "--layout", "gpt-oss"], ["--format", "mxfp4"], ["--format", "nf4"]]


def node() -> Path:
    """The folder with the installed package."""
    folder = ROOT / "target" / "hub-count"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json", "count.mjs"):
        shutil.copy(HERE / "hub" / name, folder / name)
    if not (folder / "node_modules" / "@huggingface" / "hub").exists():
        subprocess.run(["npm", "ci", "--omit=optional", "--ignore-scripts", "--silent"], cwd=folder, check=True)
    return folder


def convert(prequant: str, source: Path, out: Path, flags: list[str]) -> None:
    subprocess.run([prequant, "convert", source, out, "--quiet", *flags], check=True)


def gpt_oss(prequant: str, folder: Path) -> Path:
    """The smallest source in gpt-oss's own layout, with its experts in bf16."""
    from safetensors.numpy import save_file
    import numpy as np

    folder.mkdir()
    half = lambda *shape: np.zeros(shape, np.float16)
    experts = "model.layers.0.mlp.experts"
    save_file({
        f"{experts}.gate_up_proj": half(4, 64, 128), f"{experts}.gate_up_proj_bias": half(4, 128),
        f"{experts}.down_proj": half(4, 64, 64), f"{experts}.down_proj_bias": half(4, 64),
        "model.layers.0.self_attn.q_proj.weight": half(64, 64), "model.embed_tokens.weight": half(96, 64),
    }, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]}))
    return folder


def main() -> int:
    prequant = sys.argv[1]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        sources = [(ROOT / "fixtures" / "tiny-qwen3-moe", FORMATS), (gpt_oss(prequant, work / "gpt-oss"), OF_GPT_OSS)]
        folders = []
        for number, (source, formats) in enumerate(sources):
            folders.append((f"{source.name}", source))
            for flags in formats:
                out = work / f"{number}-{len(folders)}"
                convert(prequant, source, out, flags)
                folders.append((f"{source.name} {' '.join(flags)}", out))
        command = ["node", "count.mjs", *(str(folder) for _, folder in folders)]
        counted = subprocess.run(command, cwd=node(), check=True, capture_output=True, text=True)
        wrong = 0
        for (title, folder), theirs in zip(folders, json.loads(counted.stdout), strict=True):
            said = subprocess.run([prequant, "inspect", "--json", folder], check=True, capture_output=True, text=True)
            ours = json.loads(said.stdout)["hub_parameters"]["by_dtype"]
            if theirs is None or {k: v for k, v in theirs.items() if v} != ours:
                wrong += 1
                print(f"{title}: inspect says {ours}, the hub's code counts {theirs}")
        print(counted.stderr, end="", file=sys.stderr)
    print(f"{len(folders)} checkpoints, {wrong} counted otherwise")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
