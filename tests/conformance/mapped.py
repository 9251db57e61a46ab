"""Opens weights as readers do that copy nothing: mapped into memory, each tensor where it lies in the file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open


def check_mapped(folder: Path) -> None:
    """Takes every tensor of every file of a folder out of a mapping with numpy and torch, and compares it with the safetensors library's.

    A view of wider elements than bytes is refused, or slow, where a tensor doesn't start at a multiple of their size.
    """
    for path in sorted(folder.glob("*.safetensors")):
        mapped = np.memmap(path, dtype=np.uint8, mode="c")  # torch warns of what it can't write to
        start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
        header = json.loads(mapped[8:start].tobytes())
        assert header.pop("__metadata__") == {"format": "pt"}, path
        with safe_open(path, framework="pt") as opened:
            assert set(opened.keys()) == set(header), path
            for name, entry in header.items():
                expected = opened.get_tensor(name)
                begin, end = (start + offset for offset in entry["data_offsets"])
                size = expected.element_size()
                assert begin % size == 0, f"{path.name}: {name} of {entry['dtype']} is at byte {begin}"
                if begin == end:
                    continue
                here = torch.from_numpy(mapped[begin:end]).view(expected.dtype).reshape(expected.shape)
                assert here.data_ptr() % size == 0, name
                assert torch.equal(here.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8)), name
