"""Golden data for sources that compressed-tensors stored: what its own compressors decompress them to, on a CPU.

    scripts/make compressed-sources            writes fixtures/compressed-sources
    scripts/make compressed-sources --check    makes them anew and compares byte for byte

What is in a file: see coded.py. Scales of eight-bit floats that are F32 decode to F32 in the library; clients load them in the
model's dtype, and so the golden is that number rounded to it.
"""

from __future__ import annotations

from pathlib import Path

import reproducible
from coded import DTYPES, TORCH_NAMES, floats, fp8, random_bytes, random_words, save

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme


def config(format: str, dtype: str = "bf16") -> dict:
    """A checkpoint's config.json."""
    quantization = {"quant_method": "compressed-tensors", "format": format, "ignore": ["lm_head"]}
    return {"model_type": "llama", "dtype": TORCH_NAMES[dtype], "quantization_config": quantization}


def decompressed(format: str, arguments: dict, parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the library makes of the tensors of one module."""
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**arguments))
    return BaseCompressor.get_value_from_registry(format).decompress(dict(parts), scheme)["weight"].detach()


def integers(folder: Path) -> None:
    """Groups of several sizes and whole rows, symmetric and not, columns that don't fill words, shapes in both widths."""
    for dtype_name, dtype in DTYPES.items():
        coded, decoded = {}, {}
        for case, rows, columns, group, symmetric in (
            ("g32", 11, 64, 32, True),
            ("g128", 3, 256, 128, True),
            ("row", 9, 44, None, True),
            ("g32_asym", 11, 96, 32, False),
            ("row_asym", 17, 40, None, False),
        ):
            name = f"model.layers.0.{case}_proj"
            groups = columns // group if group else 1
            parts = {
                "weight_packed": random_words(f"{case} codes", rows, -(-columns // 8)),
                "weight_scale": floats(f"{case} {dtype_name} scales", rows, groups).to(dtype),
                "weight_shape": torch.tensor([rows, columns]),
            }
            if not symmetric:
                parts["weight_zero_point"] = random_words(f"{case} points", -(-rows // 8), groups)
            strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
            arguments = {"num_bits": 4, "type": "int", "symmetric": symmetric} | strategy
            decoded[f"{name}.weight"] = decompressed("pack-quantized", arguments, parts)
            if case == "g32":
                # As Moonshot AI's are.
                parts["weight_shape"] = parts["weight_shape"].to(torch.int32)
            coded |= {f"{name}.{end}": tensor for end, tensor in parts.items()}
        save(folder / f"int4-{dtype_name}.safetensors", config("pack-quantized", dtype_name), coded, decoded)


def four_bit_floats(folder: Path) -> None:
    """NVFP4 with several global scales, beside what is for inputs; MXFP4 with every exponent but the highest."""
    coded, decoded = {}, {}
    for case, global_scale in (("q", 2688.0), ("k", 0.37), ("v", 31234.5)):
        name = f"model.layers.0.self_attn.{case}_proj"
        parts = {
            "weight_packed": random_bytes(f"nvfp4 {case}", 16, 32),
            "weight_scale": fp8(f"nvfp4 {case} scales", 16, 4).view(torch.uint8).bitwise_and(0x7F).view(torch.float8_e4m3fn),
            "weight_global_scale": torch.tensor([global_scale], dtype=torch.float32),
        }
        arguments = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        decoded[f"{name}.weight"] = decompressed("nvfp4-pack-quantized", arguments, parts)
        parts["input_global_scale"] = torch.tensor([3.0])
        coded |= {f"{name}.{end}": tensor for end, tensor in parts.items()}
    save(folder / "nvfp4.safetensors", config("nvfp4-pack-quantized"), coded, decoded)

    name = "model.layers.0.mlp.up_proj"
    parts = {
        "weight_packed": random_bytes("mxfp4", 16, 16 * 16),
        "weight_scale": torch.arange(256, dtype=torch.int32).clamp(max=254).to(torch.uint8).reshape(16, 16),
    }
    arguments = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    decoded = {f"{name}.weight": decompressed("mxfp4-pack-quantized", arguments, parts)}
    coded = {f"{name}.{end}": tensor for end, tensor in parts.items()}
    save(folder / "mxfp4.safetensors", config("mxfp4-pack-quantized"), coded, decoded)


def eight_bit_floats(folder: Path) -> None:
    """One scale for a tensor, for each row, for each block; in every dtype."""
    for model_name, model in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        coded, decoded = {}, {}
        for scale_name, dtype in DTYPES.items():
            for case, shape, strategy in (
                ("tensor", (1,), {"strategy": "tensor"}),
                ("scalar", (), {"strategy": "tensor"}),
                ("row", (24, 1), {"strategy": "channel"}),
                ("block", (3, 2), {"strategy": "block", "block_structure": [8, 32]}),
            ):
                name = f"model.layers.0.{case}_{scale_name}_proj"
                parts = {
                    "weight": fp8(f"{case} {scale_name}", 24, 64),
                    "weight_scale": floats(f"{case} {scale_name} scales", *shape, low=-16, high=-6).to(dtype),
                }
                arguments = {"num_bits": 8, "type": "float", "symmetric": True} | strategy
                weight = decompressed("float-quantized", arguments, parts)
                assert weight.dtype == dtype, (case, weight.dtype)
                decoded[f"{name}.weight"] = weight.to(model) if scale_name == "f32" else weight
                parts["input_scale"] = torch.tensor([0.5])
                coded |= {f"{name}.{end}": tensor for end, tensor in parts.items()}
        save(folder / f"fp8-{model_name}.safetensors", config("float-quantized", model_name), coded, decoded)


def make(folder: Path) -> None:
    """Writes all files into an empty folder."""
    torch.set_num_threads(1)
    integers(folder)
    four_bit_floats(folder)
    eight_bit_floats(folder)


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "compressed-sources", make, __doc__ or "")
