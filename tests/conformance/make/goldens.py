"""Golden data for the kernels: what bitsandbytes makes, on a CPU, of inputs chosen to be awkward.

But for one thing: FP4 has two codes for zero, 0 and 8, and which of them an element gets is what bitsandbytes' CUDA kernels
decide (csrc/kernels.cu, dQuantizeFP4): 8 if the scaled element is less than zero. Everybody who quantizes uses CUDA.

    scripts/make goldens            writes fixtures/goldens
    scripts/make goldens --check    makes them anew and compares byte for byte

input-DTYPE.safetensors           CASE                 the elements, in DTYPE
FORMAT-DTYPE.safetensors          CASE/bSIZE/packed    codes, two per byte, U8
                                  CASE/bSIZE/absmax    F32, one per block
double-quant.safetensors          CASE/absmax          F32, one per block: the true ones
                                  CASE/codes           U8, absmax's 8-bit codes
                                  CASE/nested_absmax   F32
                                  CASE/nested_offset   F32, one element
                                  CASE/restored        F32, absmax as bitsandbytes decodes it
dequantized.safetensors           FORMAT/DTYPE/CASE/bSIZE         what those codes and absmax decode to, in DTYPE
                                  FORMAT/DTYPE/double/...         a weight of its own with double quantization:
                                  packed, absmax, nested_absmax, nested_offset and the dequantized elements
tables.safetensors                nf4, fp4, dynamic    the code tables, F32
                                  nf4/thresholds, fp4/thresholds, nf4/code_of_rank, fp4/code_of_rank

Each FORMAT-DTYPE file's metadata has one entry, `goldens`: JSON with the version of bitsandbytes and, under `corners`,
which outputs CASE/bSIZE hold blocks where backends of bitsandbytes are known to differ:

    zero         whole blocks of zeros: absmax 0, and the code of 0.0
    short_zero   a short last block of zeros: absmax is stored as 1e-38
    floored      0 < absmax < 1e-38: elements are scaled by 1 / 1e-38
    short        a short last block: elements are divided by absmax, not multiplied by its reciprocal
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import reproducible
from reproducible import bell, seeded

import bitsandbytes
import numpy as np
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _get_4bit_quantize_bounds
from bitsandbytes.functional import QuantState
from safetensors.torch import save_file

FORMATS = ("nf4", "fp4")
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
FLOOR = np.float32(1e-38)
# Cases that are dequantized too, and in which block sizes: awkward ones, and few, as elements take space.
DEQUANTIZED = {case: (64,) for case in ("zero_tail", "reciprocals", "subnormal", "negative_zeros", "length_3", "length_33")} | {
    "huge": (32, 4096),
    "one_negative": (32,),
    "length_31": (32,),
    "length_65": (32, 64),
}


def cases(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The inputs, by name. Every case is quantized in every block size."""
    info = torch.finfo(dtype)
    rng = seeded("goldens")

    def signs(n: int) -> np.ndarray:
        return rng.integers(0, 2, n) * 2.0 - 1.0

    student = bell(rng, 5125) / (rng.random(5125) + 1e-3)
    zeros = np.concatenate([np.zeros(4096), bell(rng, 608)])
    zeros[4096 + 32 : 4096 + 96] = 0.0
    zeros[4096 + 320 : 4096 + 352] = 0.0
    single = np.zeros(4160)
    single[[1000, 4096 + 17]] = [-0.75, 3e-5]
    tiny = bell(rng, 4129) * info.tiny * 2.0 ** rng.integers(-9, 3, 130).repeat(32)[:4129]
    tiny[512:576] = info.smallest_normal * bell(rng, 64) * 1e-3
    tiny[576:608] = np.where(signs(32) > 0, 1.0, -1.0) * float(info.smallest_normal) * 2.0**-5
    huge = np.clip(bell(rng, 4196) / 3.0, -1.0, 1.0) * float(info.max)
    huge[::40] = info.max
    huge[7::640] = info.min
    negative_zeros = np.where(rng.random(545) < 0.5, -0.0, bell(rng, 545) * 0.02)
    negative_zeros[32:64] = -0.0
    negative_zeros[96:128] = np.abs(negative_zeros[96:128]) * 0.0
    named = {
        "normal": bell(rng, 2 * 4096 + 37) * 0.02,
        "heavy_tailed": student * 0.01,
        "zero_blocks": zeros,
        "zero_tail": np.concatenate([bell(rng, 64), np.zeros(5)]),
        "single_nonzero": single,
        "equal_magnitudes": signs(4099) * 0.37,
        "alternating": np.where(np.arange(4160) % 2 == 0, 1.0, -1.0) * np.abs(bell(rng, 4160)),
        "subnormal": tiny,
        "huge": huge,
        "negative_zeros": negative_zeros,
        "one_positive": np.array([0.3]),
        "one_negative": np.array([-0.3]),
        "length_3": bell(rng, 3),
        "length_31": bell(rng, 31),
        "length_33": bell(rng, 33),
        "length_65": bell(rng, 65),
    }
    tensors = {name: torch.from_numpy(values).to(dtype) for name, values in named.items()}
    tensors["thresholds"] = at_thresholds(dtype)
    tensors["reciprocals"] = near_thresholds(dtype)
    return tensors


def at_thresholds(dtype: torch.dtype) -> torch.Tensor:
    """Elements on the thresholds themselves, and on the next numbers of the dtype below and above them, absmax 1."""
    rng = seeded("thresholds")
    bounds = np.concatenate([_get_4bit_quantize_bounds(name, torch.device("cpu"))[0].numpy() for name in FORMATS])
    centre = torch.from_numpy(bounds).to(dtype)
    below, above = (torch.nextafter(centre, torch.full_like(centre, end)) for end in (-1.0, 1.0))
    choices = torch.cat([centre, below, above])
    values = choices[torch.from_numpy(rng.integers(0, len(choices), 4096 + 32))]
    values[::32] = 1.0
    return values


def near_thresholds(dtype: torch.dtype) -> torch.Tensor:
    """Blocks of 32 in which x / absmax and x * (1 / absmax) fall on different sides of a threshold of FP4 or NF4.

    Where a dtype has too few such elements, ones within a few units in the last place of a threshold fill up.
    """
    rng = seeded("reciprocals")
    blocks = 64
    values = np.empty((blocks, 32), np.float32)
    bounds = np.concatenate([_get_4bit_quantize_bounds(name, torch.device("cpu"))[0].numpy() for name in FORMATS])
    for block in values:
        absmax = torch.tensor(1.0 + rng.random()).to(dtype).float().numpy()
        candidates = (bounds[:, None] * absmax * (1.0 + np.arange(-40, 41) * 1e-7)).astype(np.float32)
        candidates = np.unique(torch.from_numpy(candidates.reshape(-1)).to(dtype).float().numpy())
        quotient, product = candidates / absmax, candidates * (np.float32(1.0) / absmax)
        crossed = (bounds[:, None] < quotient) != (bounds[:, None] < product)
        distance = np.abs(quotient - bounds[:, None]).min(axis=0)
        best = np.lexsort((distance, ~crossed.any(axis=0)))
        block[:] = candidates[best[np.arange(32) % len(best)]]
        block[rng.integers(0, 32)] = absmax
    tail = values[-1, :31]
    return torch.from_numpy(np.concatenate([values.reshape(-1), tail])).to(dtype)


def quantized(values: torch.Tensor, block_size: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed codes and absmax by bitsandbytes, compared with the rule in plain numpy."""
    packed, state = quantize_4bit(values, block_size, name)
    packed = packed.reshape(-1)
    expected_packed, expected_absmax = by_rule(values.float().numpy(), block_size, name)
    assert np.array_equal(packed.numpy(), expected_packed), f"{name}, block {block_size}: codes off the rule"
    assert np.array_equal(state.absmax.numpy(), expected_absmax), f"{name}, block {block_size}: absmax off the rule"
    return packed, state.absmax


def quantize_4bit(values: torch.Tensor, block_size: int, name: str, **options: bool) -> tuple[torch.Tensor, QuantState]:
    """bitsandbytes' codes, with the zeros of its CUDA kernels, and its state."""
    packed, state = functional.quantize_4bit(values, blocksize=block_size, quant_type=name, **options)
    if name == "fp4":
        codes = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1).numpy()
        below_zero = np.append(scaled(values.float().numpy(), block_size) < 0, np.zeros(len(codes) - len(values), bool))
        codes[(codes == 0) | (codes == 8)] = 0
        codes[(codes == 0) & below_zero] = 8
        packed = torch.from_numpy(codes[::2] << 4 | codes[1::2]).reshape(packed.shape)
    return packed, state


def bounds(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """bitsandbytes' thresholds, and the codes by how many of them an element is greater than; FP4's zeros as said above."""
    thresholds, code_of_rank = _get_4bit_quantize_bounds(name, torch.device("cpu"))
    if name == "fp4":
        thresholds, code_of_rank = thresholds.clone(), code_of_rank.clone()
        assert thresholds[7] == 0 and code_of_rank[7:9].tolist() == [0, 8]
        thresholds[7], code_of_rank[7], code_of_rank[8] = float(np.nextafter(np.float32(0), np.float32(-1))), 8, 0
    return thresholds, code_of_rank


def scaled(values: np.ndarray, block_size: int) -> np.ndarray:
    """Elements by their block's absmax, as bitsandbytes computes it."""
    parts = []
    for start in range(0, len(values), block_size):
        block = values[start : start + block_size]
        divisor = max(np.abs(block).max(), FLOOR)
        parts.append(block * (np.float32(1.0) / divisor) if len(block) == block_size else block / divisor)
    return np.concatenate(parts)


def by_rule(values: np.ndarray, block_size: int, name: str) -> tuple[np.ndarray, np.ndarray]:
    """bitsandbytes' CPU arithmetic spelled out; prequant's scalar kernel follows the same words."""
    thresholds, code_of_rank = (table.numpy() for table in bounds(name))
    codes = code_of_rank[(scaled(values, block_size)[:, None] > thresholds).sum(axis=1)]
    blocks = [values[start : start + block_size] for start in range(0, len(values), block_size)]
    largest = [np.abs(block).max() for block in blocks]
    absmax = [most if len(block) == block_size else max(most, FLOOR) for block, most in zip(blocks, largest, strict=True)]
    if len(values) % 2:
        codes = np.append(codes, code_of_rank[(np.float32(0.0) > thresholds).sum()])
    joined = codes.astype(np.uint8)
    return joined[::2] << 4 | joined[1::2], np.array(absmax, np.float32)


def corners(values: torch.Tensor, block_size: int) -> list[str]:
    """The known corner cases that some block of this input is; see the module's documentation."""
    magnitudes = values.float().abs().numpy()
    whole = magnitudes[: len(magnitudes) // block_size * block_size].reshape(-1, block_size).max(axis=1)
    tail = magnitudes[len(whole) * block_size :]
    largest = np.append(whole, tail.max()) if len(tail) else whole
    found = {
        "zero": bool((whole == 0).any()),
        "short_zero": bool(len(tail) and tail.max() == 0),
        "floored": bool(((largest > 0) & (largest < FLOOR)).any()),
        "short": bool(len(tail)),
    }
    return [name for name, there in found.items() if there]


def absmax_cases() -> dict[str, torch.Tensor]:
    """absmax vectors to quantize again: real ones of random weights, and awkward ones."""
    rng = seeded("double-quant")

    def of_weights(weights: np.ndarray) -> np.ndarray:
        return np.abs(weights.reshape(-1, 64)).max(axis=1)

    named = {
        "normal_1000": of_weights(bell(rng, 64000) * 0.02),
        "normal_255": of_weights(bell(rng, 255 * 64) * 0.02),
        "normal_256": of_weights(bell(rng, 256 * 64) * 0.02),
        "normal_257": of_weights(bell(rng, 257 * 64) * 0.02),
        "heavy_tailed": of_weights(bell(rng, 600 * 64) / (rng.random(600 * 64) + 1e-3)),
        "uneven": np.concatenate([of_weights(bell(rng, 300 * 64) * scale) for scale in (0.001, 1.0)]),
        "with_zeros": np.where(rng.random(300) < 0.3, 0.0, rng.random(300)),
        "all_zero": np.zeros(300),
        "equal": np.full(300, 0.125),
        "one": np.array([0.7]),
        "two": np.array([0.7, 0.1]),
        "tiny": rng.random(300) * 1e-30,
        "large": rng.random(300) * 1e30,
    }
    return {name: torch.from_numpy(values.astype(np.float32)) for name, values in named.items()}


def double_quantized(absmax: torch.Tensor) -> dict[str, torch.Tensor]:
    """What quantize_4bit(compress_statistics=True) does to absmax, and what dequantizing gives back."""
    offset = absmax.mean()
    codes, state = functional.quantize_blockwise(absmax - offset, blocksize=256)
    return {
        "absmax": absmax,
        "codes": codes,
        "nested_absmax": state.absmax,
        "nested_offset": offset.reshape(1),
        "restored": functional.dequantize_blockwise(codes, state) + offset,
    }


def double_dequantized(dtype: torch.dtype, name: str) -> dict[str, torch.Tensor]:
    """A weight with double quantization, in blocks enough for two nested ones, and what it decodes to.

    Its length is even: bitsandbytes decodes odd ones elsewhere, and there FP4's second zero (code 8) has no sign.
    """
    weight = torch.from_numpy(bell(seeded("double dequantized"), 257 * 32 + 6) * 0.02).to(dtype)
    packed, state = quantize_4bit(weight, 32, name, compress_statistics=True)
    return {
        "packed": packed.reshape(-1),
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.reshape(1),
        "dequantized": functional.dequantize_4bit(packed, state).reshape(-1),
    }


def dequantized(inputs: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """What `quantize_4bit`'s codes decode to, by case and block size."""
    outputs = {}
    for case, sizes in DEQUANTIZED.items():
        for size in sizes:
            packed, state = quantize_4bit(inputs[case], size, name)
            outputs[f"{case}/b{size}"] = functional.dequantize_4bit(packed, state).reshape(-1)
    return outputs


def save(tensors: dict[str, torch.Tensor], path: Path, corner_cases: dict[str, list[str]] | None = None) -> None:
    """One metadata entry only: safetensors writes several in no fixed order."""
    about = {"bitsandbytes": bitsandbytes.__version__, "corners": corner_cases or {}}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"goldens": json.dumps(about)})


def make(folder: Path) -> None:
    """Writes all golden files into an empty folder."""
    torch.set_num_threads(1)
    functional.name2qmap["dynamic"] = dynamic_map()
    for dtype_name, dtype in DTYPES.items():
        inputs = cases(dtype)
        save(inputs, folder / f"input-{dtype_name}.safetensors")
        for name in FORMATS:
            outputs, corner_cases = {}, {}
            for case, values in inputs.items():
                assert torch.isfinite(values).all(), case
                for block_size in BLOCK_SIZES:
                    key = f"{case}/b{block_size}"
                    outputs[f"{key}/packed"], outputs[f"{key}/absmax"] = quantized(values, block_size, name)
                    corner_cases[key] = corners(values, block_size)
            save(outputs, folder / f"{name}-{dtype_name}.safetensors", corner_cases)

    decoded = {}
    for dtype_name, dtype in DTYPES.items():
        for name in FORMATS:
            parts = dequantized(cases(dtype), name)
            parts |= {f"double/{part}": tensor for part, tensor in double_dequantized(dtype, name).items()}
            decoded |= {f"{name}/{dtype_name}/{part}": tensor for part, tensor in parts.items()}
    save(decoded, folder / "dequantized.safetensors")

    doubled = {case: double_quantized(absmax) for case, absmax in absmax_cases().items()}
    flat = {f"{case}/{part}": tensor for case, parts in doubled.items() for part, tensor in parts.items()}
    save(flat, folder / "double-quant.safetensors")

    tables = {"dynamic": functional.name2qmap["dynamic"]}
    for name in FORMATS:
        tables[name] = functional.get_4bit_type(name, device="cpu")
        thresholds, code_of_rank = bounds(name)
        tables[f"{name}/thresholds"], tables[f"{name}/code_of_rank"] = thresholds, code_of_rank.to(torch.uint8)
    save(tables, folder / "tables.safetensors")


def dynamic_map() -> torch.Tensor:
    """The dynamic map as torch makes it where it has vector units.

    torch.linspace rounds otherwise without them, in some last bits; every client's machine has them, this process
    (see reproducible.py) does without.
    """
    code = """if True:
        import logging, sys
        logging.disable(logging.ERROR)
        from bitsandbytes import functional
        sys.stdout.buffer.write(functional.create_dynamic_map().numpy())"""
    environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
    made = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, check=True)
    return torch.from_numpy(np.frombuffer(made.stdout, dtype=np.float32).copy())


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "goldens", make, __doc__)
