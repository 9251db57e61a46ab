"""Writes src/models/data/vllm.json: what vLLM's weight loader expects of our formats, read from vLLM's source.

    scripts/make vllm FOLDER [--out FILE]     from the folder that holds vllm/
    scripts/make vllm FOLDER --check          compares with the file that is there

vLLM needs a GPU, so it can't load what we write in a test; scripts/conformance vllm checks checkpoints against this list instead.
Nothing of vLLM is imported or run: facts are taken from the syntax tree, and a fact that isn't where it was is an error.

formats   which quantization_config selects the format ("select"), and the tensors beside a Linear's and an expert's name, with
          dtype and shape: R rows, C columns, G columns of a group, E experts, I and H an expert's inner and outer size
models    by architecture: Linears that one layer is made of ("stacked"), what the ignore list knows of that ("packed", and
          "packed_if" where a condition decides), how names become vLLM's ("prefix", "substr", "suffix"), experts' names, and
          Linears that are never quantized
fused     all sets of Linears that become one layer in any of its models, and in which files

"at" is the file, below vllm/model_executor/, and line.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
CT = "layers/quantization/compressed_tensors"
CONFIG = f"{CT}/compressed_tensors.py"
WNA16, WNA16_MOE = f"{CT}/schemes/compressed_tensors_wNa16.py", f"{CT}/compressed_tensors_moe/compressed_tensors_moe_wna16.py"
MODELOPT, MXFP4 = "layers/quantization/modelopt.py", "layers/quantization/mxfp4.py"
MATCHING = "layers/quantization/utils/config_utils.py"
ARCHITECTURES = [
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GptOssForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "OlmoeForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "Qwen3_5MoeForConditionalGeneration",
]
DTYPES = {"int32": "I32", "uint8": "U8", "float32": "F32", "int64": "I64", "float8_e4m3fn": "F8_E4M3", "params_dtype": "source"}

# vLLM's words for sizes of a Linear, of experts' gate and up (w13), and of experts' down (w2).
LINEAR = {
    "output_size_per_partition": "R",
    "sum(output_partition_sizes)": "R",
    "shapes.output_size_per_partition": "R",
    "input_size_per_partition": "C",
    "input_size": "C",
    "shapes.input_size_per_partition": "C",
    "len(output_partition_sizes)": "1",  # one for each of the Linears that are put together
    "shapes.num_partitions": "1",
}
COMMON = {
    "self.group_size": "G",
    "group_size": "G",
    "ctx.group_size": "G",
    "self.quant_config.group_size": "G",
    "self.num_bits": "4",
    "self.packed_factor": "8",
    "num_experts": "E",
    "global_sf_num_experts": "E",
}
W13 = {
    "w13_n": "R",
    "w13_num_shards * intermediate_size_per_partition": "R",
    "self.moe.w13_num_shards * intermediate_size_per_partition": "R",
    "hidden_size": "C",
    "w13_num_shards": "1",
    "num_groups_w13": "C // G",
}
W2 = {"hidden_size": "R", "intermediate_size_per_partition": "C", "num_groups_w2": "C // G"}


class Missing(Exception):
    """A fact is not where it was."""


class Source:
    """vLLM's files, parsed."""

    def __init__(self, folder: Path):
        self.root = folder / "vllm" / "model_executor"
        if not self.root.is_dir():
            raise Missing(f"{folder} doesn't hold vllm/model_executor")

    @cache
    def tree(self, path: str) -> ast.Module:
        return ast.parse((self.root / path).read_text())

    def node(self, path: str, name: str) -> Any:
        """A class, function or assignment by its dotted name."""
        found: Any = self.tree(path)
        for part in name.split("."):
            inside = [node for node in found.body if part in names(node)]
            if not inside:
                raise Missing(f"{path} has no {name}")
            found = inside[-1]
        return found

    def at(self, path: str, name: str) -> str:
        return f"{path}:{self.node(path, name).lineno}"


def names(node: ast.AST) -> list[str]:
    """What a statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [target.id for target in targets if isinstance(target, ast.Name)]


def bases(owner: ast.ClassDef) -> list[str]:
    return [base.id for base in owner.bases if isinstance(base, ast.Name)]


# Tensors that a method creates


class Parameters(ast.NodeVisitor):
    """Follows a create_weights: the parameters it registers, and under which conditions."""

    def __init__(self, path: str, words: dict[str, str]):
        self.path, self.words = path, COMMON | words
        self.values: dict[str, ast.expr] = {}
        self.conditions: list[str] = []
        self.found: list[tuple[str, ast.Call, list[str]]] = []

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Name):
            self.values[node.targets[0].id] = node.value

    def visit_If(self, node: ast.If) -> None:
        for prefix, branch in (("", node.body), ("not ", node.orelse)):
            self.conditions.append(prefix + ast.unparse(node.test))
            for statement in branch:
                self.visit(statement)
            self.conditions.pop()

    def visit_Call(self, node: ast.Call) -> None:
        if ast.unparse(node.func).endswith((".register_parameter", ".register_params")):
            name = next(word.value for word in node.args if isinstance(word, ast.Constant))
            self.found.append((name, node, list(self.conditions)))

    def fact(self, call: ast.Call) -> dict:
        """Dtype, shape and place of what a call registers."""
        if len(call.args) > 2:  # self.register_params(layer, "weight", shape, dtype, ...)
            dims, dtype = call.args[2].elts, call.args[3]  # type: ignore[attr-defined]
        else:
            dims, dtype = self.data(call.args[1])
        torch_name = ast.unparse(self.resolved(dtype)).removeprefix("torch.") if dtype else None
        shape = [self.size(each) for each in dims]
        return {"dtype": DTYPES.get(torch_name), "shape": shape, "at": f"{self.path}:{call.lineno}"}

    def resolved(self, node: ast.expr) -> ast.expr:
        return self.resolved(self.values[node.id]) if isinstance(node, ast.Name) and node.id in self.values else node

    def data(self, value: ast.expr) -> tuple[list[ast.expr], ast.expr | None]:
        """Sizes and dtype of the tensor that a parameter is made of."""
        value = self.resolved(value)
        assert isinstance(value, ast.Call), ast.unparse(value)
        words = {word.arg: word.value for word in value.keywords}
        if ast.unparse(value.func) in ("torch.empty", "torch.zeros", "torch.ones"):
            return self.dims(value.args), words.get("dtype")
        if ast.unparse(value.func) == "torch.full":
            return self.dims(value.args[0].elts), words.get("dtype")  # type: ignore[attr-defined]
        if None in words:  # **weight_scale_args
            given = self.resolved(words[None])
            assert isinstance(given, ast.Dict)
            words |= {ast.literal_eval(key): word for key, word in zip(given.keys, given.values) if key}
        return self.data(words["data"] if "data" in words else value.args[0])

    def dims(self, sizes: list[ast.expr]) -> list[ast.expr]:
        """Sizes, those of *self.get_weight_shape("w13_scale", ...) looked up in its table."""
        if not isinstance(sizes[0], ast.Starred):
            return sizes
        table, call = self.values["shape_map"], sizes[0].value
        assert isinstance(table, ast.Dict) and isinstance(call, ast.Call)
        keys = [ast.literal_eval(key) for key in table.keys if key]
        return table.values[keys.index(ast.literal_eval(call.args[0]))].elts  # type: ignore[attr-defined]

    def size(self, node: ast.expr) -> str:
        """A size in our words."""
        text = ast.unparse(node)
        if text in self.words:
            return self.words[text]
        if isinstance(node, ast.Constant):
            return text
        if self.resolved(node) is not node:
            return self.size(self.resolved(node))
        if isinstance(node, ast.BinOp):
            operators = {ast.FloorDiv: "//", ast.Mult: "*", ast.Div: "/"}
            return f"{self.size(node.left)} {operators[type(node.op)]} {self.size(node.right)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "math.ceil":
            return f"ceil({self.size(node.args[0])})"
        raise Missing(f"{self.path}:{node.lineno}: what size is {text}?")


def created(source: Source, path: str, name: str, words: dict, holds: dict[str, bool], side: str = "") -> dict[str, dict]:
    """What a method registers where `holds` says which conditions do, of names that begin with `side`, without that."""
    visitor = Parameters(path, words)
    owner = source.node(path, name.split(".")[0])
    for method in ("get_weight_shape", name.split(".")[1]):  # the first has sizes that the second uses
        if any(method in names(node) for node in owner.body):
            visitor.visit(source.node(path, f"{owner.name}.{method}"))
    facts = {}
    for tensor, call, conditions in visitor.found:
        if tensor.startswith(side):
            if unknown := [each for each in conditions if each not in holds]:
                raise Missing(f"{path}:{call.lineno}: does {unknown} hold?")
            if all(holds[each] for each in conditions):
                facts[tensor.removeprefix(side)] = visitor.fact(call)
    if not facts:
        raise Missing(f"{path}: {name} registers nothing")
    return facts


def of_expert(source: Source, path: str, name: str, holds: dict[str, bool]) -> dict[str, dict]:
    """Of one expert's gate, up or down. The loader puts X of gate and up into w13_X, and that of down into w2_X."""
    gate, down = (created(source, path, name, words, holds, side) for side, words in (("w13_", W13), ("w2_", W2)))
    for fact in (*gate.values(), *down.values()):
        experts, *fact["shape"] = fact["shape"]
        if experts != "E":
            raise Missing(f"{fact['at']} isn't a tensor of all experts")
    for tensor, fact in gate.items():
        fact["shape"] = ["1"] if fact["shape"] in ([], ["1"]) else fact["shape"]
        same = down[tensor]["shape"] or ["1"], down[tensor]["dtype"]
        if (fact["shape"], fact["dtype"]) != same:
            raise Missing(f"{fact['at']}: {fact} of gate and up isn't {same} of down")
    return gate


# Which config.json selects a format


def conditions(source: Source, path: str, name: str) -> dict[str, list]:
    """What a method asks of QuantizationArgs: allowed values by key."""
    function = source.node(path, name)
    values = {node.targets[0].id: node.value for node in ast.walk(function) if isinstance(node, ast.Assign)}
    asked: dict[str, list] = {}

    def read(node: ast.expr, negated: bool = False) -> None:
        node = values.get(node.id, node) if isinstance(node, ast.Name) else node
        if isinstance(node, ast.BoolOp):
            for each in node.values:
                read(each, negated)
        elif isinstance(node, ast.UnaryOp):
            read(node.operand, True)
        elif isinstance(node, ast.Compare):
            key, value = ast.unparse(node.left), node.comparators[0]
            asked.setdefault(key.rpartition(".")[2], []).append(constant(value))
        elif isinstance(node, ast.Attribute):
            asked.setdefault(node.attr, []).append(not negated)
        else:
            raise Missing(f"{path}:{node.lineno}: what does {ast.unparse(node)} ask?")

    for node in ast.walk(function):
        if isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant):
            read(node.value)
    return asked


def constant(node: ast.expr) -> Any:
    """A literal, or what an enumeration's member is called in config.json."""
    if isinstance(node, ast.Constant):
        return node.value
    member = ast.unparse(node).removesuffix(".value")
    return member.partition(".")[2].lower()


def formats(source: Source, models: Models) -> dict[str, dict]:
    """What selects each format, and its tensors."""

    def select(method: str) -> dict:
        asked = conditions(source, CONFIG, f"CompressedTensorsConfig.{method}")
        at = source.at(CONFIG, f"CompressedTensorsConfig.{method}")
        return {"quant_method": "compressed-tensors", "weights": asked, "at": at}

    made = {}
    for name, symmetric in (("int4", True), ("int4-asym", False)):
        chosen = select("_is_wNa16_group_channel")
        if chosen["weights"].pop("input_quant") != [None]:
            raise Missing(f"{chosen['at']}: activations aren't asked for any more")
        # Not asked by vLLM, but what tells the two apart, and what create_weights takes from it.
        chosen["weights"] |= {"num_bits": [4], "type": ["int"], "symmetric": [symmetric]}
        holds = {"not self.symmetric": not symmetric, "self.moe.has_bias": False}
        made[name] = {
            "select": chosen | {"format": "pack-quantized"},
            "linear": created(source, WNA16, "CompressedTensorsWNA16.create_weights", LINEAR, holds),
            "expert": of_expert(source, WNA16_MOE, "CompressedTensorsWNA16MoEMethod.create_weights", holds),
        }
        sizes = source.node("layers/quantization/utils/marlin_utils.py", "MARLIN_SUPPORTED_GROUP_SIZES")
        made[name]["group_sizes"] = ast.literal_eval(sizes.value)
    weight_only = {"not self.use_a16": False}
    nvfp4 = f"{CT}/schemes/compressed_tensors_w4a4_nvfp4.py", f"{CT}/compressed_tensors_moe/compressed_tensors_moe_w4a4_nvfp4.py"
    made["nvfp4"] = {
        "select": select("_is_nvfp4_format"),
        "linear": created(source, nvfp4[0], "CompressedTensorsW4A4Fp4.create_weights", LINEAR, weight_only),
        "expert": of_expert(source, nvfp4[1], "CompressedTensorsW4A4Nvfp4MoEMethod.create_weights", weight_only),
        "shared": "weight_global_scale",
    }
    mxfp4 = f"{CT}/schemes/compressed_tensors_w4a4_mxfp4.py", f"{CT}/compressed_tensors_moe/compressed_tensors_moe_w4a4_mxfp4.py"
    made["mxfp4"] = {
        "select": select("_is_mxfp4"),
        "linear": created(source, mxfp4[0], "CompressedTensorsW4A4Mxfp4.create_weights", LINEAR, {}),
        "expert": of_expert(source, mxfp4[1], "CompressedTensorsW4A4Mxfp4MoEMethod.create_weights", {}),
    }
    required = [
        node.value
        for node in ast.walk(source.node(MODELOPT, "ModelOptNvFp4Config._from_config"))
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "required_fields"
    ]
    made["nvfp4 modelopt"] = {
        # NVFP4 without activations' scales is read as W4A4, with scales that nothing has set.
        "select": {
            "quant_method": "modelopt",
            "quant_algo": "W4A16_NVFP4",
            "hf_quant_config": ast.literal_eval(required[0]),
            "at": source.at(MODELOPT, "ModelOptNvFp4Config._from_config"),
        },
        "linear": created(source, MODELOPT, "KNvfp4Static.create_weights", LINEAR, {"role is not WEIGHT": True}),
        "expert": of_expert(source, MODELOPT, "ModelOptNvFp4FusedMoE.create_weights", {}),
        "shared": "weight_scale_2",
    }
    for each in made.values():  # W4A16 has no scales of activations; what is there for them stays as it was made
        each["expert"] = {tensor: fact for tensor, fact in each["expert"].items() if not tensor.startswith("input_")}
        if each["expert"].keys() != each["linear"].keys():
            raise Missing(f"{sorted(each['expert'])} of experts aren't {sorted(each['linear'])} of Linears")
    made["mxfp4 gpt-oss"] = gpt_oss(source, models)
    return made


def gpt_oss(source: Source, models: Models) -> dict:
    """gpt-oss' experts: all of a layer in one tensor, under names of their own; its Linears stay as they are."""
    words = {"mxfp4_block": "32"}
    sides = ("gate_up_proj", "w13_", W13 | words), ("down_proj", "w2_", W2 | words)
    fused = "GptOssMxfp4MoEMethod.create_weights"
    suffixes = models.described("models/gpt_oss.py", "GptOssForCausalLM")["suffix"]
    tensors = {}
    for projection, side, sizes in sides:
        for tensor, fact in created(source, MXFP4, fused, sizes, {"self.moe.has_bias": True}, side).items():
            ends = {"weight": "_blocks", "weight_scale": "_scales", "bias": "_bias"}[tensor]
            if suffixes[f".{projection}{ends}"] != f".{side}{tensor}":
                raise Missing(f"gpt_oss: {projection}{ends} isn't {side}{tensor}")
            tensors[projection + ends] = fact
    config = "GptOssMxfp4Config.override_quantization_method"
    return {"select": {"quant_method": "mxfp4", "model_type": "gpt_oss", "at": source.at(MXFP4, config)}, "layer": tensors}


# Models


class Models:
    """Names of weights in vLLM's models."""

    def __init__(self, source: Source):
        self.source = source

    def owner(self, path: str, name: str) -> tuple[str, ast.ClassDef] | None:
        """The class that a name means in a file, and the file that has it."""
        for node in self.source.tree(path).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return path, node
            if isinstance(node, ast.ImportFrom) and any((alias.asname or alias.name) == name for alias in node.names):
                module = (node.module or "").removeprefix("vllm.model_executor.models.")
                other = f"models/{module}.py"
                if (self.source.root / other).exists():
                    return self.owner(other, next(alias.name for alias in node.names if (alias.asname or alias.name) == name))
        return None

    def attribute(self, path: str, name: str, key: str) -> dict:
        """A class attribute, its own or its bases'."""
        found = self.owner(path, name)
        if not found:
            return {}
        path, owner = found
        for node in owner.body:
            if key in names(node) and isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value:
                return self.value(path, node.value)
        return next((value for base in bases(owner) if (value := self.attribute(path, base, key))), {})

    def family(self, path: str, name: str) -> list[ast.ClassDef]:
        """A class and its bases."""
        found = self.owner(path, name)
        return [found[1], *(each for base in bases(found[1]) for each in self.family(found[0], base))] if found else []

    def value(self, path: str, node: ast.expr) -> dict:
        """A mapping: a literal, another class', a WeightsMapper of literals, or several of them with |."""
        if isinstance(node, ast.BinOp):
            left, right = self.value(path, node.left), self.value(path, node.right)
            nested = all(isinstance(each, dict) for each in (*left.values(), *right.values()))
            return {key: left.get(key, {}) | right.get(key, {}) for key in left | right} if nested else left | right
        if isinstance(node, ast.Attribute):
            return self.attribute(path, ast.unparse(node.value), node.attr)
        if isinstance(node, ast.Dict) and None in node.keys:  # {**another, ...}
            merged: dict = {}
            for key, value in zip(node.keys, node.values):
                merged |= {ast.literal_eval(key): ast.literal_eval(value)} if key else self.value(path, value)
            return merged
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "WeightsMapper":
            kinds = {str(word.arg).removeprefix("orig_to_new_"): word.value for word in node.keywords}
            literals = {kind: ast.literal_eval(kinds[kind]) for kind in ("prefix", "substr", "suffix") if kind in kinds}
            if "stacked" in kinds:
                literals["stacked"] = {key: into for key, (into, _) in ast.literal_eval(kinds["stacked"]).items()}
            return literals
        return ast.literal_eval(node) or {}

    def stacked(self, path: str, known: Callable[..., dict] | None = None) -> dict[str, str]:
        """What a file's classes put together: parts of checkpoints' names, and of vLLM's."""
        pairs: dict[str, str] = {}
        for node in ast.walk(self.source.tree(path)):
            if isinstance(node, ast.ClassDef):
                pairs |= (known or self.attribute)(path, node.name, "hf_to_vllm_mapper").get("stacked", {})
            # Lists of (vLLM's name, checkpoint's name, which part), before there were mappers.
            if "_mapping" in "".join(names(node)) and isinstance(getattr(node, "value", None), ast.List):
                rows = [each.elts for each in node.value.elts if isinstance(each, ast.Tuple)]  # type: ignore[attr-defined]
                rows = [[part.value for part in row] for row in rows if all(isinstance(part, ast.Constant) for part in row)]
                pairs |= {row[1]: row[0] for row in rows if len(row) == 3 and isinstance(row[0], str) and row[1] != row[0]}
        return pairs

    def never(self, path: str) -> list[str]:
        """Linears that a file gives no quantization, whatever config.json says: by their last names."""
        given: dict[str, set[bool]] = {}
        for node in ast.walk(self.source.tree(path)):
            words = {word.arg: word.value for word in node.keywords} if isinstance(node, ast.Call) else {}
            prefix = words.get("prefix")
            if ast.unparse(getattr(node, "func", ast.Pass())).endswith("Linear") and isinstance(prefix, ast.JoinedStr):
                last = str(getattr(prefix.values[-1], "value", "")).rpartition(".")[2]
                config = words.get("quant_config")
                unquantized = config is None or (isinstance(config, ast.Constant) and config.value is None)
                given.setdefault(last, set()).add(unquantized)
        return sorted(last for last, states in given.items() if states == {True})

    def described(self, path: str, name: str) -> dict:
        """An architecture's row."""
        found = self.owner(path, name)
        if not found:
            raise Missing(f"{path} has no {name}")
        path, owner = found
        mapper = self.attribute(path, name, "hf_to_vllm_mapper")
        stacked = mapper.pop("stacked", {}) | self.stacked(path)
        packed_if = {}
        for node in (node for each in reversed(self.family(path, name)) for node in ast.walk(each)):
            for each in node.body if isinstance(node, ast.If) else ():
                if isinstance(each, ast.Assign) and ast.unparse(each.targets[0]).startswith("self.packed_modules_mapping["):
                    key = ast.literal_eval(each.targets[0].slice)  # type: ignore[attr-defined]
                    packed_if[key] = [ast.literal_eval(each.value), ast.unparse(node.test)]
        text = (self.source.root / path).read_text()
        given = re.search(r"ckpt_names=(\(.*?\))", text, re.DOTALL)
        gate, down, up = ast.literal_eval(given[1]) if given else self.default_experts()
        return {
            "packed": self.attribute(path, name, "packed_modules_mapping"),
            "packed_if": packed_if,
            "stacked": stacked,
            "prefix": mapper.get("prefix", {}),
            "substr": mapper.get("substr", {}),
            "suffix": mapper.get("suffix", {}),
            "experts": [gate, up, down],
            "never": self.never(path),
            "at": f"{path}:{owner.lineno}",
        }

    def default_experts(self) -> tuple[str, str, str]:
        factory = self.source.node("layers/fused_moe/layer.py", "FusedMoEFactory").args
        defaults = dict(zip([each.arg for each in factory.args][-len(factory.defaults) :], factory.defaults))
        return ast.literal_eval(defaults["ckpt_names"])

    def all(self) -> dict[str, dict]:
        """Every architecture of ARCHITECTURES."""
        rows: dict[str, tuple[str, str]] = {}
        for table in ("_TEXT_GENERATION_MODELS", "_MULTIMODAL_MODELS"):
            dictionary = self.source.node("models/registry.py", table).value
            for key, value in zip(dictionary.keys, dictionary.values):
                if isinstance(key, ast.Constant) and isinstance(value, ast.Tuple):
                    rows.setdefault(key.value, ast.literal_eval(value))
        made = {name: self.described(f"models/{rows[name][0]}.py", rows[name][1]) for name in ARCHITECTURES}
        # Its loader takes experts one by one under these names alone, and passes over others without a word.
        streamed = self.source.node("models/gpt_oss.py", "_GPT_OSS_STREAMED_EXPERT_SUFFIX_TO_SHARD")
        made["GptOssForCausalLM"]["expert_tensors"] = sorted(ast.literal_eval(streamed.value))
        return made

    def fused(self) -> list[dict]:
        """Sets of Linears that become one layer anywhere, by their last names."""

        def known(*of: str) -> dict:
            try:
                return self.attribute(*of)
            except ValueError:  # made by a function
                return {}

        sets: dict[tuple[str, ...], set[str]] = {}
        for file in sorted((self.source.root / "models").rglob("*.py")):
            path = str(file.relative_to(self.source.root))
            joined: dict[str, list[str]] = {}
            for member, into in self.stacked(path, known).items():
                joined.setdefault(into, []).append(member)
            for node in ast.walk(self.source.tree(path)):
                if isinstance(node, ast.ClassDef):
                    packed = known(path, node.name, "packed_modules_mapping")
                    joined |= {f"{node.name} {into}": members for into, members in packed.items()}
            for members in joined.values():
                last = tuple(sorted({member.strip(".").rpartition(".")[2] for member in members}))
                if len(last) > 1:
                    sets.setdefault(last, set()).add(Path(path).stem)
        rows = sorted(sets.items(), key=lambda row: (-len(row[1]), row[0]))
        return [{"members": list(members), "files": sorted(files)[:4], "count": len(files)} for members, files in rows]


# The file


def matching(source: Source) -> dict[str, str]:
    """Where the rules stand that scripts/conformance vllm follows."""
    layer = "layers/fused_moe/routed_experts.py"
    return {
        "a name is listed": source.at(MATCHING, "is_equal_or_regex_match"),
        "a fused layer is listed": source.at(MATCHING, "find_matching_patterns"),
        "some of a fused layer are listed: an error": source.at(f"{CT}/utils.py", "should_ignore_layer"),
        "targets match parts of class names": source.at(f"{CT}/utils.py", "find_matched_target"),
        "names are mapped but for patterns": source.at(CONFIG, "CompressedTensorsConfig.apply_vllm_mapper"),
        "experts go by the first one": source.at(
            f"{CT}/compressed_tensors_moe/compressed_tensors_moe.py", "CompressedTensorsMoEMethod.get_moe_method"
        ),
        "experts' names": source.at(layer, "RoutedExperts.build_expert_params_mapping"),
        "modelopt's list": source.at(MODELOPT, "ModelOptQuantConfigBase.is_layer_excluded"),
        "modelopt's list, fused layers and experts": source.at("layers/quantization/utils/quant_utils.py", "is_layer_skipped"),
    }


def expectations(folder: Path) -> str:
    """The file's text: a line for each fact of a kind."""
    source = Source(folder)
    version = re.search(r"version = '([^']+)'", (folder / "vllm" / "_version.py").read_text())
    if not version:
        raise Missing("vllm/_version.py has no version")
    models = Models(source)
    tables = {"formats": formats(source, models), "matching": matching(source), "models": models.all()}

    def line(value: Any) -> str:
        return json.dumps(value, separators=(", ", ": "))

    text = f'{{"vllm": {line(version[1])},\n'
    for table, rows in tables.items():
        text += f'"{table}": {{\n' + ",\n".join(f"{line(key)}: {line(row)}" for key, row in rows.items()) + "\n},\n"
    return text + '"fused": [\n' + ",\n".join(map(line, models.fused())) + "\n]}\n"


def main() -> int:
    """Writes the file, or compares with it."""
    parser = argparse.ArgumentParser(prog="scripts/make vllm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "src" / "models" / "data" / "vllm.json")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    try:
        text = expectations(arguments.folder)
    except Missing as missing:
        print(f"scripts/make vllm: {missing}", file=sys.stderr)
        return 1
    if arguments.check:
        if text != arguments.out.read_text():
            print(f"{arguments.out} is not what {arguments.folder} says", file=sys.stderr)
            return 1
    else:
        arguments.out.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
