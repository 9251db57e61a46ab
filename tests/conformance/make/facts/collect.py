"""What is known of one model type: the tensors of each of its classes."""

import hashlib
import json
import os

import torch
import transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

import models
import names
import patterns
from settings import SETTINGS


def start():
    """In each worker: quiet, on one core."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    models.without_packages()


def settings_hash(model_type):
    """Changes where what is set for a type does."""
    return hashlib.sha256(repr(SETTINGS.get(model_type)).encode()).hexdigest()[:8]


def write(task):
    """Writes what is known of a type into a file, whole or not at all."""
    model_type, path = task
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(describe(model_type)))
    part.replace(path)


def describe(model_type):
    """For each class its tensors; for those that can't be built, why."""
    built, failed = {}, {}
    try:
        classes = models.classes_of(model_type)
    except Exception as error:  # any: transformers' own code is run
        return {"model_type": model_type, "built": built, "failed": {"its module": why(error)}}
    for name, cls in classes.items():
        try:
            built[name] = describe_class(model_type, cls)
        except Exception as error:
            failed[name] = why(error)
    return {"model_type": model_type, "built": built, "failed": failed}


def why(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:160]


def describe_class(model_type, cls):
    tensors, off_disk, first, errors = {}, set(), None, []
    for labels in (models.LABELS, None):
        # Where a class has no other number of labels than its own.
        if first is not None:
            break
        for config in models.configs_of(model_type, labels):
            try:
                model = models.build(cls, config)
            except Exception as error:  # any: another config may do
                errors.append(error)
                continue
            first = first or model
            add(model, tensors, off_disk)
    if first is None:
        raise errors[0]
    return {"base": first.base_model_prefix or "", "rows": sorted(rows(tensors)), "off_disk": sorted(off_disk)}


def add(model, tensors, off_disk):
    """Adds to `tensors` what a model says of each: its kinds, with its number of dimensions, and its modules."""
    loaded = names.Loaded(model)
    stored = set()
    for name, shape, keys, moved in names.on_disk(loaded):
        stored.update(keys)
        if len(shape) < 2:
            continue
        kind = names.kind_of(loaded, keys[0])
        # Matrices of single experts belong to no module of the loaded model.
        is_module = kind in names.LINEARS or kind == "conv1d" or (kind == "experts" and len(shape) > 2)
        if moved and (kind in names.LINEARS or (kind == "experts" and len(keys) > 1 and len(shape) > 2)):
            kind = "cut"
        if kind == "linear" and not loaded.takes_statistics(name):
            kind = "cut"
        kinds, modules = tensors.setdefault(name, (set(), set()))
        kinds.add((len(shape), kind))
        modules.update(names.module_of(key) for key in (keys if is_module else [name]))
    for module, owner in model.named_modules():
        if (type(owner) is nn.Linear or isinstance(owner, Conv1D)) and f"{module}.weight" not in stored:
            off_disk.add(patterns.opened(module))


def rows(tensors):
    """Lists (pattern, number of dimensions, kind, patterns of its modules if they are called otherwise) of all tensors."""
    for pattern, members, modules in patterns.rows({name: modules for name, (_, modules) in tensors.items()}):
        others = [] if modules == [names.module_of(pattern)] else modules
        for rank, kind in sorted(set().union(*(tensors[name][0] for name in members))):
            yield [pattern, rank, kind, others]
