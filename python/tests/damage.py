"""Changes to safetensors files, for tests of what is noticed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]


def rewrite(folder: Path, change: Callable[[Tensors], None]) -> None:
    """Applies a change to all tensors of a folder, which become one file."""
    tensors: Tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        path.unlink()
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def remove(tensors: Tensors, start: str, end: str = "") -> None:
    """Removes the tensors whose names start and end so; there must be some."""
    names = [name for name in tensors if name.startswith(start) and name.endswith(end)]
    assert names, f"no tensor is called {start!r}...{end!r}"
    for name in names:
        del tensors[name]


def edit_state(tensors: Tensors, name: str, **changes: object) -> None:
    """Changes entries of a tensor's quant_state."""
    (key,) = (key for key in tensors if key.startswith(f"{name}.quant_state."))
    state = json.loads(bytes(tensors[key].tolist())) | changes
    tensors[key] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)


def edit_config(folder: Path, change: Callable[[dict], None]) -> None:
    """Applies a change to config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
