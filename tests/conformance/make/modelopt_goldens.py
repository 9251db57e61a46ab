"""Golden data for NVFP4 in ModelOpt's layout: what ModelOpt makes, on a CPU, of awkward inputs and of a small checkpoint.

    scripts/make modelopt-goldens            writes fixtures/modelopt-goldens
    scripts/make modelopt-goldens --check    makes them anew and compares byte for byte

input-DTYPE.safetensors    CASE             a weight [rows, columns] in DTYPE, for cases that fixtures/group-goldens has not
nvfp4-DTYPE.safetensors    CASE/packed      U8 [rows, columns / 2]
                           CASE/scale       E4M3 [rows, columns / 16]
                           CASE/scale_2     F32, a scalar
                           CASE/restored    what ModelOpt dequantizes to, in DTYPE
tiny-qwen3-moe.json        tensors          of fixtures/tiny-qwen3-moe as ModelOpt exports it: dtype, shape, SHA-256
                           hf_quant_config  hf_quant_config.json as it stands
                           quantization_config    what config.json gets
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import tempfile
import warnings
from pathlib import Path

import reproducible
from reproducible import bell, seeded

# ModelOpt's and torch's own remarks on each other.
warnings.filterwarnings("ignore")

import modelopt.torch.quantization as mtq
import numpy as np
import torch
import transformers
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.export.unified_export_hf import _export_quantized_weight
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
# Of fixtures/group-goldens; others would only add bytes. Not all_zero: ModelOpt's scales are NaN then.
SHARED = ("normal", "spread", "zeros", "subnormal", "huge", "narrow")
COLUMNS = 256


def cases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Weights at the edges of ModelOpt's rule. 10.5 in a tensor makes scale_2 a power of two, 2^-8: quotients are exact."""
    rng = seeded("modelopt goldens")
    # Every quarter from -8 to 8 over a scale of 1 and of 2^-3.
    quarters = np.clip(np.arange(2 * COLUMNS).reshape(2, -1) % 65 / 4.0 - 8.0, -6.0, 6.0)
    quarters[:, ::16] = 6.0
    code_ties = np.concatenate([quarters * 2.0**exponent for exponent in (0, -3)])
    code_ties[0, 0] = 10.5
    # A group's scale half way between two E4M3 numbers, the subnormal ones too, and below the least.
    halfway = (np.arange(17, 32, 2)[:, None] * 2.0 ** np.arange(-10, 4)).reshape(-1)
    subnormal = np.concatenate([np.arange(0.5, 8.0), np.arange(0.125, 1.0, 0.125)]) * 2.0**-9
    scales = np.concatenate([halfway, subnormal, [446.0, 447.0, 448.0]])
    scales = np.resize(scales, (len(scales) + 15) // 16 * 16).reshape(-1, 16)
    scale_ties = np.clip(bell(rng, scales.size * 16).reshape(*scales.shape, 16) / 3.0, -0.99, 0.99)
    scale_ties[..., 5] = -1.0
    scale_ties = (scale_ties * scales[..., None] * 6.0 * 2.0**-8).reshape(-1, COLUMNS)
    scale_ties[-1, -11] = -10.5
    # Groups so small beside the largest that nothing of their scale is left.
    exponents = {torch.float16: (15, 4, -8, -24)}.get(dtype, (126, 0, -40, -128))
    vanishing = bell(rng, COLUMNS).reshape(4, 4, 16).clip(-1.9, 1.9)
    vanishing = (vanishing * 2.0 ** np.array(exponents)[None, :, None]).reshape(1, COLUMNS)
    named = {"code_ties": code_ties, "scale_ties": scale_ties, "vanishing": vanishing}
    return {name: torch.tensor(values, dtype=torch.float64).to(dtype) for name, values in named.items()}


def quantize(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the unified export stores for a Linear with this weight, weight-only, and what is read back."""
    rows, columns = weight.shape
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    with contextlib.redirect_stdout(io.StringIO()):
        linear = mtq.quantize(linear, mtq.W4A16_NVFP4_CFG)
    _export_quantized_weight(linear, weight.dtype)
    packed, scale, scale_2 = linear.weight.data, linear.weight_scale, linear.weight_scale_2
    stored = NVFP4QTensor(weight.shape, weight.dtype, packed)
    restored = stored.dequantize(scale=scale, double_scale=scale_2, block_sizes={-1: 16})
    return {"packed": packed, "scale": scale, "scale_2": scale_2, "restored": restored}


def export(source: Path) -> dict[str, dict]:
    """A checkpoint's weight-only export: its tensors' digests, and its configuration."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        with torch.inference_mode(), contextlib.redirect_stdout(io.StringIO()):
            export_hf_checkpoint(mtq.quantize(model, mtq.W4A16_NVFP4_CFG), export_dir=folder)
        tensors = {}
        for name, tensor in sorted(load_file(f"{folder}/model.safetensors").items()):
            digest = hashlib.sha256(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            tensors[name] = {"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "sha256": digest}
        hf_quant_config = json.loads(Path(folder, "hf_quant_config.json").read_text())
        quantization_config = json.loads(Path(folder, "config.json").read_text())["quantization_config"]
    return {"tensors": tensors, "hf_quant_config": hf_quant_config, "quantization_config": quantization_config}


def make(folder: Path) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for dtype_name, dtype in DTYPES.items():
        shared = load_file(reproducible.ROOT / f"fixtures/group-goldens/input-{dtype_name}.safetensors")
        own = cases(dtype)
        save_file(own, folder / f"input-{dtype_name}.safetensors")
        outputs = {}
        for case, weight in ({name: shared[name] for name in SHARED} | own).items():
            assert torch.isfinite(weight).all(), case
            outputs |= {f"{case}/{kind}": value.contiguous() for kind, value in quantize(weight).items()}
        save_file(outputs, folder / f"nvfp4-{dtype_name}.safetensors")
    exported = export(reproducible.ROOT / "fixtures/tiny-qwen3-moe")
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(about)}" for name, about in exported.pop("tensors").items())
    rest = "".join(f",\n{json.dumps(name)}: {json.dumps(about)}" for name, about in exported.items())
    (folder / "tiny-qwen3-moe.json").write_text(f'{{"tensors": {{\n{rows}\n}}{rest}}}\n')


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "modelopt-goldens", make, __doc__ or "")
