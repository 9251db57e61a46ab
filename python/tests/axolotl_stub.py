"""As much of axolotl as a plugin meets: where BasePlugin is, which hooks it has, what their arguments are called.

Written after the interface of axolotl 0.21. `install` puts it where `import axolotl.integrations.base` finds it.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


class Config(dict):
    """A run's options: a key that isn't set reads as None."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)


class BasePlugin:
    """The hooks between reading the YAML and training, in the order in which they are called."""

    def __init__(self) -> None: ...
    def register(self, cfg: dict) -> None: ...
    def pre_model_load(self, cfg: Config) -> None: ...
    def post_model_build(self, cfg: Config, model: Any) -> None: ...
    def pre_lora_load(self, cfg: Config, model: Any) -> None: ...
    def post_lora_load(self, cfg: Config, model: Any) -> None: ...
    def post_model_load(self, cfg: Config, model: Any) -> None: ...
    def post_lora_merge(self, cfg: Config, adapter_path: str, output_path: str) -> None: ...


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `axolotl.integrations.base` importable for one test."""
    base = ModuleType("axolotl.integrations.base")
    base.BasePlugin = BasePlugin
    for name, module in {
        "axolotl": ModuleType("axolotl"),
        "axolotl.integrations": ModuleType("axolotl.integrations"),
        "axolotl.integrations.base": base,
    }.items():
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "prequant_loader.axolotl", raising=False)
