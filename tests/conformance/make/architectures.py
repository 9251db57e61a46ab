"""Writes src/models/data/architectures.json: what transformers makes of every tensor of the most used architectures; and
compared.txt beside it, their model types.

Each class is built from its default config on the meta device (no weight exists). Its parameters are renamed to the
names save_pretrained writes, layer and expert numbers become `*`, and each row says what module owns the tensor and
whether `load_in_4bit` would make a 4-bit Linear of it. The rules and rows in src/models are tested against this file.

Needs torch 2.15.0, transformers 5.23.0 and bitsandbytes 0.50.2.

    scripts/make architectures [--check] [--only CLASS]...
"""

import argparse
import copy
import json
import re
import sys
import traceback
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import core_model_loading as loading
from transformers import initialization
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

# The classes hub checkpoints are saved from. Heads other than the language model's matter for encoders only.
CLASSES = """
LlamaForCausalLM LlamaForSequenceClassification MistralForCausalLM MixtralForCausalLM Mistral3ForConditionalGeneration
Ministral3ForCausalLM
Qwen2ForCausalLM Qwen3ForCausalLM Qwen2MoeForCausalLM Qwen3MoeForCausalLM Qwen3NextForCausalLM
Qwen3_5ForConditionalGeneration Qwen3_5MoeForConditionalGeneration Qwen3_5MoeForCausalLM Qwen3_5ForCausalLM
Qwen2VLForConditionalGeneration Qwen2_5_VLForConditionalGeneration Qwen3VLForConditionalGeneration
Qwen3VLMoeForConditionalGeneration Qwen2AudioForConditionalGeneration
GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM Gemma3ForConditionalGeneration Gemma3nForCausalLM
Gemma4ForConditionalGeneration Gemma4ForCausalLM PaliGemmaForConditionalGeneration
PhiForCausalLM Phi3ForCausalLM PhimoeForCausalLM
DeepseekV2ForCausalLM DeepseekV3ForCausalLM DeepseekV32ForCausalLM GptOssForCausalLM
Llama4ForConditionalGeneration Llama4ForCausalLM MllamaForConditionalGeneration
GraniteForCausalLM GraniteMoeForCausalLM GraniteMoeHybridForCausalLM GraniteMoeSharedForCausalLM
OlmoForCausalLM Olmo2ForCausalLM Olmo3ForCausalLM OlmoeForCausalLM FlexOlmoForCausalLM
GlmForCausalLM Glm4ForCausalLM Glm4MoeForCausalLM Glm4MoeLiteForCausalLM GlmMoeDsaForCausalLM
Glm4vForConditionalGeneration Glm4vMoeForConditionalGeneration
GPT2LMHeadModel OpenAIGPTLMHeadModel GPTBigCodeForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM GPTJForCausalLM
FalconForCausalLM BloomForCausalLM OPTForCausalLM Starcoder2ForCausalLM CodeGenForCausalLM MptForCausalLM
CohereForCausalLM Cohere2ForCausalLM StableLmForCausalLM MambaForCausalLM Mamba2ForCausalLM FalconMambaForCausalLM
JambaForCausalLM BambaForCausalLM FalconH1ForCausalLM Zamba2ForCausalLM NemotronForCausalLM NemotronHForCausalLM
RecurrentGemmaForCausalLM RwkvForCausalLM
Ernie4_5ForCausalLM Ernie4_5_MoeForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM
MiniMaxForCausalLM MiniMaxM2ForCausalLM Lfm2ForCausalLM Lfm2MoeForCausalLM SmolLM3ForCausalLM SeedOssForCausalLM
Exaone4ForCausalLM ExaoneMoeForCausalLM Dots1ForCausalLM ApertusForCausalLM KimiLinearForCausalLM
HeliumForCausalLM ArceeForCausalLM AfmoeForCausalLM LongcatFlashForCausalLM SolarOpenForCausalLM
BertModel BertForMaskedLM BertForPreTraining BertForSequenceClassification RobertaModel RobertaForMaskedLM
RobertaForSequenceClassification XLMRobertaModel XLMRobertaForMaskedLM DistilBertModel DistilBertForMaskedLM
DistilBertForSequenceClassification MPNetModel MPNetForMaskedLM DebertaV2Model DebertaV2ForMaskedLM
DebertaV2ForSequenceClassification ModernBertModel ModernBertForMaskedLM ElectraModel AlbertModel NomicBertModel
T5ForConditionalGeneration T5EncoderModel MT5ForConditionalGeneration UMT5ForConditionalGeneration
BartForConditionalGeneration MBartForConditionalGeneration MarianMTModel M2M100ForConditionalGeneration
WhisperForConditionalGeneration Wav2Vec2Model HubertModel
CLIPModel CLIPTextModel CLIPVisionModel SiglipModel SiglipVisionModel Siglip2Model ViTModel ViTForImageClassification
Dinov2Model DINOv3ViTModel
LlavaForConditionalGeneration LlavaNextForConditionalGeneration LlavaOnevisionForConditionalGeneration
Idefics3ForConditionalGeneration SmolVLMForConditionalGeneration InternVLForConditionalGeneration
Blip2ForConditionalGeneration
""".split()

# What the default configs leave unset although the class needs it, or set so that a kind of layer has no rows.
SETTINGS = {
    "NemotronForCausalLM": {"num_key_value_heads": 8},
    "HunYuanDenseV1ForCausalLM": {"head_dim": 128},
    "HunYuanMoEV1ForCausalLM": {"head_dim": 128},
    "Dots1ForCausalLM": {"n_routed_experts": 8, "n_shared_experts": 2, "first_k_dense_replace": 1},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 16, "num_hidden_layers": 32},
    "GraniteMoeHybridForCausalLM": {
        "layer_types": ["mamba", "attention"] * 16, "layers_block_type": ["mamba", "attention"] * 16,
        "num_local_experts": 8, "num_experts_per_tok": 2,
    },
}


def config_of(cls):
    """The class's default config, changed where the defaults can't be built or leave a kind of layer out."""
    config = cls.config_class()
    text = config.get_text_config()
    if cls.__name__.startswith("Gemma4"):
        # One model has the 26B-A4B's experts and the E4B's per-layer inputs, so that both have rows.
        if hasattr(config, "vision_config"):
            config.vision_config = transformers.Gemma4VisionConfig()
        text.enable_moe_block, text.num_experts, text.top_k_experts, text.moe_intermediate_size = True, 8, 2, 64
    for key, value in SETTINGS.get(cls.__name__, {}).items():
        setattr(text, key, value)
    return config


def on_disk(model):
    """Pairs (name and shape on disk, model parameters it is made from, whether numbers move) as save_pretrained does.

    Follows transformers' revert_weight_conversion, which forgets where a tensor came from.
    """
    state = dict(model.state_dict())
    for key in model._keys_to_ignore_on_save or ():
        state.pop(key, None)
    for key in getattr(model, "all_tied_weights_keys", {}):
        state.pop(key, None)
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    conversions = [c for c in conversions if not isinstance(c, loading.PrefixChange)]
    reverse = [c.reverse_transform() for c in conversions[::-1]]
    renamings = [c for c in reverse if isinstance(c, loading.WeightRenaming)]
    converters = [c for c in reverse if isinstance(c, loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    groups = {}
    for key, tensor in sorted(state.items(), key=lambda item: loading.dot_natural_key(item[0])):
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


def kind_of(model, key):
    """What owns the parameter `key`, in the words of the rows."""
    path, _, leaf = key.rpartition(".")
    owner = model.get_submodule(path)
    owner_class = type(owner).__name__
    if leaf in dict(owner.named_buffers(recurse=False)):
        return "buffer"
    if leaf == "weight" and type(owner) is nn.Linear:
        return "linear"
    if leaf == "weight" and isinstance(owner, Conv1D):
        return "conv1d_transposed"
    if leaf == "weight" and isinstance(owner, nn.Linear):
        return "linear_subclass"
    tensor = getattr(owner, leaf)
    if "expert" in (owner_class + "." + path.rpartition(".")[2]).lower() and tensor.dim() == 3:
        return "expert"
    # Granite's fused experts live in a module of their own kind.
    if owner_class.endswith("ParallelExperts") and tensor.dim() == 3:
        return "expert"
    if leaf.endswith("bias"):
        return "bias"
    if isinstance(owner, nn.Embedding):
        return "embedding"
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution"
    if "norm" in owner_class.lower():
        return "norm"
    if any(word in owner_class.lower() for word in ("router", "gate", "gating")):
        return "router"
    return "parameter"


def collapsed(name):
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def rows_of(model):
    skips = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    rows = {}
    for name, shape, keys, moved in on_disk(model):
        kind = kind_of(model, keys[0])
        module = keys[0].rpartition(".")[0]
        row = {"name": collapsed(name), "rank": len(shape), "kind": kind}
        if kind in ("linear", "conv1d_transposed") and not should_convert_module(module, skips):
            row["skipped"] = True
        if moved and kind != "expert":
            row["rearranged"] = True
        if kind == "expert" and any(keys[0].endswith(end) for end in ("_bias", ".bias")):
            row["kind"] = "bias"
        if set(keys) & tied:
            row["tied"] = True
        modules = sorted({collapsed(key.rpartition(".")[0]) for key in keys})
        if kind in ("linear", "conv1d_transposed") and modules != [row["name"].rpartition(".")[0]]:
            row["modules"] = modules
        if kind == "expert" and len(shape) == 3 and keys != [name]:
            row["parameters"] = sorted({collapsed(key) for key in keys})
        # Layers of one pattern may differ (a first dense layer, a tied last one): each difference is a row.
        rows.setdefault(json.dumps(row, sort_keys=True), row)
    stored = {key for _, _, keys, _ in on_disk(model) for key in keys}
    off_disk = {
        collapsed(module)
        for module, owner in model.named_modules()
        if (type(owner) is nn.Linear or isinstance(owner, Conv1D)) and f"{module}.weight" not in stored
    }
    return sorted(off_disk), sorted(rows.values(), key=lambda row: (row["name"], row["rank"], row["kind"]))


def describe(name):
    cls = getattr(transformers, name)
    config = config_of(cls)
    with torch.device("meta"), initialization.no_init_weights():
        model = cls(config)
    types = [config.model_type]
    for key in config.sub_configs or ():
        sub = getattr(config, key, None)
        sub_type = sub.get("model_type") if isinstance(sub, dict) else getattr(sub, "model_type", None)
        if sub_type and sub_type not in types:
            types.append(sub_type)
    off_disk, tensors = rows_of(model)
    # Linears whose weight is another tensor's: no row names them, yet they must not become 4-bit.
    return {"class": name, "model_types": types, "off_disk": off_disk, "tensors": tensors}


def main():
    parser = argparse.ArgumentParser(prog="scripts/make architectures", description=__doc__.splitlines()[0])
    parser.add_argument("--only", action="append", help="a class, for trying things out; may be repeated")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    done, failed = [], []
    for name in args.only or CLASSES:
        try:
            done.append(describe(name))
        except Exception as error:
            if args.only:
                traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}: {str(error)[:200]}")
    out = ['{"transformers": "%s", "architectures": [' % transformers.__version__]
    for index, architecture in enumerate(done):
        head = {key: architecture[key] for key in ("class", "model_types", "off_disk")}
        out.append(json.dumps(head)[:-1] + ', "tensors": [')
        out.append(",\n".join(json.dumps(row, separators=(",", ":")) for row in architecture["tensors"]))
        out.append("]}" + ("," if index + 1 < len(done) else ""))
    args.out.write_text("\n".join(out) + "\n]}\n")
    compared = sorted({architecture["model_types"][0] for architecture in done})
    (args.out.parent / "compared.txt").write_text("".join(f"{model_type}\n" for model_type in compared))
    rows = sum(len(architecture["tensors"]) for architecture in done)
    print(f"{len(done)} classes, {rows} rows, {args.out.stat().st_size} bytes")
    for line in failed:
        print("failed:", line, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
