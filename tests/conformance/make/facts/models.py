"""Which classes transformers has for each model type, and how each is built without weights."""

import copy
import importlib
import inspect
import re

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.modeling_utils import PreTrainedModel

from settings import SETTINGS

# Rows of a Linear that has one of these numbers are labels: no other number of any default config is one.
LABELS = 947

# Experts of a layer are all alike: a few have the names of all.
EXPERTS = 4
EXPERT_COUNTS = (
    "n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts", "num_moe_experts", "num_routed_experts",
    "encoder_sparse_num_experts", "ffn_num_experts",
)

# Classes that others are made of.
BASE = re.compile("^_|PreTrained|Pretrained")

# Backbones of timm, whose names are timm's own: the pinned environment has no timm, and nothing in them is known.
TIMM_BACKBONES = {"TimmBackbone": "timm_backbone", "TimmWrapperModel": "timm_wrapper"}

def model_types():
    """All of them, in order."""
    return sorted(CONFIG_MAPPING_NAMES)


def classes_of(model_type):
    """Names of the type's classes: those of the auto classes first, then all others that its module defines for its config."""
    names = []
    for mapping in sorted(name for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES")):
        found = getattr(modeling_auto, mapping).get(model_type, ())
        names += [found] if isinstance(found, str) else list(found)
    config = CONFIG_MAPPING[model_type]
    try:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        names += sorted(
            name for name, cls in vars(module).items()
            if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) and cls.__module__ == module.__name__
            and cls.config_class is config and not BASE.search(name)
        )
    except ImportError:
        pass # A configuration without a model of its own.
    names = [name for name in dict.fromkeys(names) if not name.endswith("Config")]
    return {name: cls for name in names if (cls := class_named(name, config)) is not None}


def class_named(name, config):
    cls = getattr(transformers, name, None)
    if cls is None:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
        cls = getattr(module, name, None)
    return cls if inspect.isclass(cls) and issubclass(cls, PreTrainedModel) else None


def configs_of(model_type, labels):
    """Configs to build the type's classes with, each shows names that the others don't: heads that are tied, and that aren't."""
    base = CONFIG_MAPPING[model_type]()
    for key, value in SETTINGS.get(model_type, {}).items():
        set_in(base, key, value)
    shrink(base, labels)
    yield base
    for tie in (False, True):
        config = copy.deepcopy(base)
        tied = [one for one in nested(config) if getattr(one, "tie_word_embeddings", None) is (not tie)]
        for one in tied:
            one.tie_word_embeddings = tie
        if tied:
            yield config


def nested(config):
    """A config and all configs inside it."""
    yield config
    for value in vars(config).values():
        if isinstance(value, transformers.PreTrainedConfig):
            yield from nested(value)


def set_in(config, key, value):
    *path, last = key.split(".")
    for part in path:
        config = getattr(config, part)
    setattr(config, last, getattr(transformers, value)() if isinstance(value, str) and value.endswith("Config") else value)


def shrink(config, labels):
    for one in nested(config):
        for key in EXPERT_COUNTS:
            if isinstance(vars(one).get(key), int) and vars(one)[key] > EXPERTS:
                setattr(one, key, EXPERTS)
        if labels is not None and len(vars(one).get("id2label") or ()) == 2:
            one.num_labels = labels


class NoChannels:
    """What timm says of a backbone's stages."""

    def channels(self):
        return [64, 128, 256, 512]


def without_timm(name, model_type):
    """A backbone of timm becomes a model without tensors, so that nothing is said of them."""

    def init(self, config, **_):
        PreTrainedModel.__init__(self, config)
        self.timm_model, self.feature_info = nn.Module(), NoChannels()
        self.post_init()

    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    backbone = getattr(module, name)
    backbone.__init__, backbone.channels, backbone.num_features = init, NoChannels().channels(), 64


def without_packages():
    """Lets classes be built whose packages are needed to run them only, and without writing their documentation."""
    from transformers.utils import import_utils

    def undocumented(decorated=None, **_):
        return (lambda function: function) if decorated is None else decorated

    transformers.utils.auto_docstring = undocumented
    for module in (transformers.utils, import_utils):
        module.requires_backends = lambda *_, **__: None
    for name, model_type in TIMM_BACKBONES.items():
        without_timm(name, model_type)


def build(cls, config):
    """The model, on the meta device; a class of a nested config is built from that."""
    inner = [one for one in nested(config) if type(one) is cls.config_class]
    config = inner[0] if inner and type(config) is not cls.config_class else config
    with torch.device("meta"), initialization.no_init_weights():
        return cls(copy.deepcopy(config))
