"""The plain way to pre-quantize a checkpoint with bitsandbytes: tensor by tensor, shard by shard. For scripts/bench and
scripts/bench-scale.

    bitsandbytes_loop.py SOURCE DESTINATION [DEVICE]

DEVICE is cpu, or cuda. Prints how long it took without the imports, and without starting the GPU.
"""

import logging
import sys
import time
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("torch.utils.flop_counter").setLevel(logging.ERROR)

import torch
from bitsandbytes import functional
from safetensors import safe_open
from safetensors.torch import save_file


def main(source: Path, destination: Path, device: str = "cpu") -> None:
    """Quantizes every tensor to nf4 with bitsandbytes' defaults."""
    if device != "cpu":
        functional.quantize_4bit(torch.zeros(64, 64, device=device, dtype=torch.bfloat16), quant_type="nf4")
    start = time.perf_counter()
    destination.mkdir(parents=True)
    for shard in sorted(source.glob("*.safetensors")):
        tensors = {}
        with safe_open(shard, "pt", device=device) as file:
            for name in file.keys():
                packed, state = functional.quantize_4bit(file.get_tensor(name), quant_type="nf4")
                tensors[name] = packed.cpu()
                tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in state.as_dict(packed=True).items()}
        save_file(tensors, destination / shard.name, {"format": "pt"})
    print(f"seconds without imports: {time.perf_counter() - start:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
