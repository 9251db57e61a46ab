"""Names of a model's tensors on disk, as save_pretrained writes them and from_pretrained takes them, and what each of them is."""

import copy
import re

from torch import nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from models import LABELS


class Loaded:
    """A model and what transformers says of it."""

    def __init__(self, model):
        self.model = model
        self.tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self.state = dict(model.state_dict())
        self.skips = HfQuantizer.get_modules_to_not_convert(model, None, None)
        self.fp32 = list(model._keep_in_fp32_modules or ())
        self.buffers = {name for name, _ in model.named_buffers()}
        output = model.get_output_embeddings()
        self.heads = {name for name, module in model.named_modules() if output is not None and module is output}
        self.tied_modules = {module_of(key) for pair in self.tied.items() for key in pair}
        conversions = get_model_conversion_mapping(model)
        self.renamings = [c for c in conversions if isinstance(c, loading.WeightRenaming)]
        self.converters = [c for c in conversions if isinstance(c, loading.WeightConverter)]

    def stored(self):
        """The parameters that save_pretrained writes."""
        ignored = self.model._keys_to_ignore_on_save or ()
        return {key: tensor for key, tensor in self.state.items() if key not in self.tied and key not in ignored}

    def target(self, name):
        """The parameter that from_pretrained makes of a tensor called `name`: the first, where there are several."""
        prefix = self.model.base_model_prefix
        return loading.rename_source_key(name, self.renamings, self.converters, prefix, self.state)[0]

    def takes_statistics(self, name):
        """Whether what belongs to a 4-bit tensor of this name is renamed as the tensor is."""
        renamed = loading.apply_renamings(name, self.renamings)
        return loading.apply_renamings(f"{name}.absmax", self.renamings) == f"{renamed}.absmax"


def module_of(key):
    return key.removesuffix(".weight")


def saved(loaded, prefixes):
    """Tuples (name and shape on disk, model parameters it is made from, whether numbers move) as save_pretrained does.

    Follows transformers' revert_weight_conversion, which forgets where a tensor came from. `prefixes`: also those that
    from_pretrained adds to names which lack them, or takes off.
    """
    model = loaded.model
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if not prefixes:
        conversions = [c for c in conversions if not isinstance(c, loading.PrefixChange)]
    reverse = [c.reverse_transform() for c in conversions[::-1]]
    renamings = [c for c in reverse if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in reverse if isinstance(c, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups = {}
    for key, tensor in sorted(loaded.stored().items(), key=lambda item: loading.dot_natural_key(item[0])):
        renamed, pattern = loading.apply_converters(key, converters)
        if pattern is None:
            yield loading.apply_renamings(key, renamings), tuple(tensor.shape), [key], False
            continue
        converter, keys = groups.setdefault(renamed, (copy.deepcopy(by_pattern[pattern]), []))
        converter.add_tensor(renamed, key, pattern, tensor)
        keys.append(key)
    for first, (converter, keys) in groups.items():
        for name, tensor in converter.convert(first, model=model, config=model.config).items():
            tensor = tensor[0] if isinstance(tensor, list) else tensor
            yield loading.apply_renamings(name, renamings), tuple(tensor.shape), keys, True


def on_disk(loaded):
    """As [`saved`], in every spelling that from_pretrained takes, each once."""
    seen = set()
    first = list(saved(loaded, prefixes=False))
    for row in first:
        seen.add(row[0])
        yield row
    others = list(saved(loaded, prefixes=True)) + [(key, tuple(t.shape), [key], False) for key, t in loaded.stored().items()]
    for row in others:
        name, _, keys, _ = row
        # What transformers itself wouldn't load there is no spelling.
        if name not in seen and loaded.target(name) in keys:
            seen.add(name)
            yield row


# Kinds of an exact nn.Linear.
LINEARS = {"linear", "fp32", "head", "tied", "last", "labels", "in_router", "cut"}

# Classes of routers; other gates are gates of attention.
ROUTER = re.compile(r"(Router|TopKGating|MoE\w*Gate)$")


def kind_of(loaded, key):
    """What owns the parameter `key`, by the letters that facts.rs reads."""
    path, _, leaf = key.rpartition(".")
    owner = loaded.model.get_submodule(path)
    name, rank = type(owner).__name__, loaded.state[key].dim()
    if key in loaded.buffers:
        return "buffer"
    if leaf == "weight" and type(owner) is nn.Linear:
        return linear(loaded, path, owner)
    if leaf == "weight" and isinstance(owner, Conv1D):
        return "conv1d"
    if leaf == "weight" and isinstance(owner, nn.Linear):
        return "subclass"
    if rank == 3 and not leaf.endswith("bias") and is_experts(name, path):
        return "experts"
    if leaf.endswith("bias"):
        return "bias"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    if ROUTER.search(name):
        return "router"
    return "parameter"


def is_experts(class_name, path):
    return "expert" in f"{class_name}.{path.rpartition('.')[2]}".lower()


def linear(loaded, path, owner):
    """What is particular to an exact nn.Linear."""
    parent, _, _ = path.rpartition(".")
    if not should_convert_module(path, loaded.fp32):
        return "fp32"
    if any(path == head or path.startswith(f"{head}.") for head in loaded.heads):
        return "head"
    if path in loaded.tied_modules or not should_convert_module(path, [m for m in loaded.skips if m in loaded.tied_modules]):
        return "tied"
    if not should_convert_module(path, loaded.skips) and not any(part.isdigit() for part in path.split(".")):
        # Of one layer among others there is nothing to say.
        return "last"
    if owner.out_features == LABELS:
        return "labels"
    if ROUTER.search(type(loaded.model.get_submodule(parent)).__name__):
        return "in_router"
    return "linear"
