"""What axolotl needs on machines without a GPU: plugins for its YAML, and as a program `axolotl train` in a process that torchrun started.

    python -m torch.distributed.run --nproc-per-node 2 tests/conformance/axolotl_cpu.py RUN.yaml

Three things keep axolotl from FSDP2 on a CPU. Everything else, the staged loading, the sharding and the trainer, is axolotl's own:

- it asks CUDA whether GPUs can reach each other;
- it makes its device mesh of CUDA devices;
- accelerate has FSDP for processes with an accelerator only, and takes others for plain data parallel ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from axolotl.integrations.base import BasePlugin
from bitsandbytes.nn.parametrize import replace_parameter_4bit


class OnCpu(BasePlugin):
    """Trains on the CPU."""

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {"use_cpu": True}


class QuantizeOnLoad(BasePlugin):
    """Has bitsandbytes quantize a bf16 model's experts after loading: axolotl itself does it on a GPU only."""

    def post_model_build(self, cfg: Any, model: torch.nn.Module) -> None:
        from axolotl.monkeypatch.moe_quant import record_quantized_expert

        for path, module in model.named_modules():
            if path.endswith(".experts"):
                record_quantized_expert(path, module)
                for name in list(module._parameters):
                    replace_parameter_4bit(module, name, quant_type="nf4", compress_statistics=False)
        model._moe_experts_quantized = True


def allow_fsdp_on_cpu() -> None:
    """Takes the three things out of the way."""
    torch.cuda.can_device_access_peer = lambda *_: True
    build, init = ParallelismConfig.build_device_mesh, AcceleratorState.__init__

    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    ParallelismConfig.build_device_mesh = lambda self, device_type: build(self, "cpu")
    AcceleratorState.__init__ = with_fsdp


if __name__ == "__main__":  # not in the processes that axolotl starts to read data
    allow_fsdp_on_cpu()
    from axolotl.cli.train import do_cli

    do_cli(sys.argv[1])
