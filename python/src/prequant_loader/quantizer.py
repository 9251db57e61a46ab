"""transformers' quantizer for bitsandbytes, made to load experts in 4 bits."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn.modules import Linear4bit
from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from .compat import GUARD, accept_guard, is_reversible, refuse_guard
from .conversion import LoadExperts, with_twins
from .errors import PrequantError
from .files import is_file, read_json
from .layout import CONVERT_AGAIN, Checkpoint, read_checkpoint
from .parametrization import decode, parametrize_4bit
from .plan import Plan, check_config, make_plan
from .verify import verify_if_asked

KEY = "bitsandbytes_4bit"
"""What transformers calls the quantizer."""


class _Loading:
    """What is known while a model is loaded. Copies are the same object, for transformers copies quantizers often."""

    def __init__(self, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        self.checkpoint, self.model, self.plan = checkpoint, model, Plan()
        self.is_guarded = False

    def __deepcopy__(self, memo: dict[int, Any]) -> _Loading:
        return self


class PrequantQuantizer(Bnb4BitHfQuantizer):
    """Loads what prequant writes, per expert and fused, and all that transformers' own quantizer loads."""

    _loading: _Loading | None = None

    def preprocess_model(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Reads the checkpoint's headers, then makes the model ready for its tensors."""
        files = [str(file) for file in kwargs.get("checkpoint_files") or []]
        if self.pre_quantized and files:
            verify_if_asked(files)
            self._loading = _Loading(read_checkpoint(files), model)
            self._loading.is_guarded = _is_guarded(Path(files[0]).parent)
            check_config(self._loading.checkpoint, self.quantization_config, model.dtype)
        return super().preprocess_model(model, *args, **kwargs)

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """transformers takes llama4's fused experts apart here, which is right only for experts stored one by one."""
        if self._loading is None or self._loading.checkpoint.has_single_experts:
            super()._convert_model_for_quantization(model)

    def update_weight_conversions(self, weight_conversions: Sequence[Any], *args: Any) -> list[Any]:
        """transformers' conversions, and what 4-bit experts need."""
        if self._loading is None:
            return list(super().update_weight_conversions(weight_conversions, *args))
        loading = self._loading
        linears = set(self.linears_4bit(loading.model))
        loading.plan = make_plan(loading.checkpoint, loading.model, weight_conversions, linears)
        own = super().update_weight_conversions([], *args)
        return with_twins(weight_conversions, loading.plan, self) + list(own)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:
        """Whether a parameter is in 4 bits: its codes have another shape, and half a byte per element."""
        if self._loading is not None and param_name in self._loading.plan.parameters:
            return True
        return bool(super().param_needs_quantization(model, param_name, **kwargs))

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """Codes become parameters that are decoded when they are read.

        They are decoded to the embeddings' dtype, which is what the model computes in: not all versions of transformers
        heed `dtype` for quantized checkpoints.
        """
        model = super()._process_model_after_weight_loading(model, **kwargs)
        if self._loading is None:
            return model
        plan, is_guarded, self._loading = self._loading.plan, self._loading.is_guarded, None
        self._check_filled(model, plan)
        embeddings: Any = model.get_input_embeddings()
        # In the order in which the model defines them, which PEFT nests adapters in: else they would fit no bf16 model.
        for name in [name for name in model.state_dict() if name in plan.parameters]:
            made = plan.parameters[name]
            dtype = embeddings.weight.dtype if embeddings is not None else made.dtype
            self.parametrize(model, name, made.shape, dtype, plan.loaded.pop(name))
        if plan.parameters and is_guarded:
            model.config.experts_implementation = GUARD  # for what save_pretrained writes
        if plan.parameters:
            _fix_peft_if_installed()
        _keep_reversible(model)
        return model

    def _check_filled(self, model: PreTrainedModel, plan: Plan) -> None:
        """No parameter was left with numbers that aren't the checkpoint's, whatever transformers made of its names."""
        unfilled = [name for name, is_filled in self.linears_4bit(model).items() if not is_filled]
        unfilled += [name for name in plan.parameters if name not in plan.loaded]
        if unfilled:
            found = f"nothing was loaded for {unfilled[0]!r}"
            raise PrequantError(model.name_or_path or type(model).__name__, "", found, "4-bit codes", CONVERT_AGAIN)

    def linears_4bit(self, model: PreTrainedModel) -> dict[str, bool]:
        """The model's modules that are Linears in 4 bits, and whether each has its codes."""
        linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
        return {name: getattr(module.weight, "quant_state", None) is not None for name, module in linears.items()}

    def parametrize(
        self, model: PreTrainedModel, name: str, shape: tuple[int, ...], dtype: torch.dtype, quant_state: dict[str, Any]
    ) -> None:
        """Makes a parameter of experts, which holds codes, one that is decoded when it is read; see `parametrize_4bit`."""
        module, _, leaf = name.rpartition(".")
        parametrize_4bit(model.get_submodule(module), leaf, shape, dtype, quant_state)

    def _dequantize(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """`model.dequantize()`: decodes experts, too, so that what is saved is a model like any other."""
        model = super()._dequantize(model, *args, **kwargs)
        embeddings: Any = model.get_input_embeddings()
        for module in list(model.modules()):
            decode(module, kwargs.get("dtype") or (embeddings.weight.dtype if embeddings is not None else None))
        if vars(model.config).get("experts_implementation") == GUARD:
            del model.config.experts_implementation
        return model


def _is_guarded(folder: Path) -> bool:
    """Whether a checkpoint's config.json has GUARD, which transformers' own config no longer tells."""
    path = folder / "config.json"
    config = read_json(path) if is_file(path) else None
    return isinstance(config, dict) and config.get("experts_implementation") == GUARD


def _keep_reversible(model: Any) -> None:
    """Lets save_pretrained write experts as the model has them: it would undo all conversions, and can't undo these."""
    used = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [entry for entry in used if not _is_twin(entry) and is_reversible(entry)]


def _is_twin(conversion: Any) -> bool:
    return any(isinstance(operation, LoadExperts) for operation in getattr(conversion, "operations", ()))


def _fix_peft_if_installed() -> None:
    """PEFT as it comes trains nothing on these experts, or adds an adapter's delta at every forward: never in silence."""
    if importlib.util.find_spec("peft") is None:
        return
    try:
        from .peft import fix_peft

        fix_peft()
    except (ImportError, RuntimeError) as error:
        warnings.warn(f"adapters on the 4-bit experts of this model won't train rightly: {error}", stacklevel=2)


_replaced: list[Any] = []
"""The quantizer that was there before this package's, while this one's is."""


def install() -> None:
    """Makes transformers load 4-bit checkpoints with this package. Importing the package does it."""
    install_quantizer(PrequantQuantizer)


def install_quantizer(quantizer: type[PrequantQuantizer]) -> None:
    """Makes transformers load 4-bit checkpoints with this package's quantizer, or a variant of it."""
    if not _is_installed():
        _replaced[:] = [AUTO_QUANTIZER_MAPPING.get(KEY, Bnb4BitHfQuantizer)]
    AUTO_QUANTIZER_MAPPING[KEY] = quantizer
    accept_guard()


def uninstall() -> None:
    """Gives transformers its own quantizer back. Models that are loaded stay as they are."""
    if _is_installed() and _replaced:
        AUTO_QUANTIZER_MAPPING[KEY] = _replaced.pop()
    refuse_guard()


def _is_installed() -> bool:
    return issubclass(AUTO_QUANTIZER_MAPPING.get(KEY, Bnb4BitHfQuantizer), PrequantQuantizer)


@contextmanager
def installed() -> Iterator[None]:
    """Makes transformers load 4-bit checkpoints with this package inside of a `with` block; then all is as it was before."""
    before: Any = AUTO_QUANTIZER_MAPPING.get(KEY) if _is_installed() else None
    install()
    try:
        yield
    finally:
        if before is None:
            uninstall()
        else:
            AUTO_QUANTIZER_MAPPING[KEY] = before
