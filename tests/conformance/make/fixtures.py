"""fixtures/tiny-qwen3-moe: a random Qwen3-MoE checkpoint laid out like those on the hub, tokenizer included.

    scripts/make fixtures            writes it
    scripts/make fixtures --check    makes it anew and compares byte for byte

Experts lie one by one, as in the released checkpoints. Two shards and an index, under 2 MiB.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import reproducible
from reproducible import bell, seeded

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "decoder_sparse_step": 1,
    "dtype": "bfloat16",
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 64,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "output_router_logits": False,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 384,
}
GENERATION_CONFIG: dict[str, Any] = {"bos_token_id": 0, "do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0}
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_prefix_space": False,
    "bos_token": None,
    "chat_template": CHAT_TEMPLATE,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "model_max_length": 2048,
    "pad_token": "<|endoftext|>",
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}
CORPUS = """\
The router looks at each token and sends it to two of the eight experts. The experts are small, and most of them rest.
A block of sixty-four weights shares one scale: the largest magnitude in the block. Each weight becomes one of sixteen
values, two in a byte. What was four bytes is now a little more than one. The norms, the embeddings and the router stay
as they were, for they are few and the rest depends on them. Reading the numbers back is one look into a table and one
multiplication. The model that was too large for the card now fits, with room for a longer conversation.
What is the capital of France? The capital of France is Paris. How many days has a week? A week has seven days.
"""
README = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# tiny-qwen3-moe

A Qwen3-MoE checkpoint with random weights, for trying and testing [prequant](../../README.md): two layers, eight
experts, about 600,000 parameters in bf16, and a byte-level BPE tokenizer of 384 entries. It says nothing sensible.

Made by `scripts/make fixtures`.
"""
LICENSE = """\
The files in this folder are random numbers and a tokenizer trained on a paragraph written for it. They are under the
same terms as prequant: MIT or Apache-2.0, at your option.
"""


def weights() -> dict[str, torch.Tensor]:
    """All tensors under their names on the hub, bf16: normal with deviation 0.02, norms near one."""
    hidden, expert = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"]
    queries = CONFIG["num_attention_heads"] * CONFIG["head_dim"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (CONFIG["vocab_size"], hidden),
        "model.embed_tokens.weight": (CONFIG["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    for number in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (queries, hidden),
            f"{layer}.self_attn.k_proj.weight": (keys, hidden),
            f"{layer}.self_attn.v_proj.weight": (keys, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, queries),
            f"{layer}.self_attn.q_norm.weight": (CONFIG["head_dim"],),
            f"{layer}.self_attn.k_norm.weight": (CONFIG["head_dim"],),
            f"{layer}.mlp.gate.weight": (CONFIG["num_experts"], hidden),
        }
        for index in range(CONFIG["num_experts"]):
            shapes |= {
                f"{layer}.mlp.experts.{index}.gate_proj.weight": (expert, hidden),
                f"{layer}.mlp.experts.{index}.up_proj.weight": (expert, hidden),
                f"{layer}.mlp.experts.{index}.down_proj.weight": (hidden, expert),
            }
    return {name: random_tensor(name, shapes[name]) for name in sorted(shapes)}


def random_tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Seeded by the tensor's own name."""
    values = bell(seeded(name), int(np.prod(shape))).reshape(shape) * 0.02
    return torch.from_numpy(values + 1.0 if "norm" in name else values).to(torch.bfloat16)


def save_shards(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Two shards of about the same size, cut in the order of names, and the index over them."""
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
    total = sum(sizes.values())
    weight_map, written = {}, 0
    for name, size in sizes.items():
        weight_map[name] = f"model-0000{1 if written < total / 2 else 2}-of-00002.safetensors"
        written += size
    for shard in sorted(set(weight_map.values())):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(part, folder / shard, {"format": "pt"})
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / "model.safetensors.index.json")


def tokenizer() -> Tokenizer:
    """A byte-level BPE as Qwen's, trained on the paragraph above."""
    result = Tokenizer(models.BPE())
    result.normalizer = normalizers.NFC()
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    result.train_from_iterator(CORPUS.splitlines(), trainer)
    return result


def write_json(value: dict, path: Path) -> None:
    """As transformers writes its own: two blanks of indent, a newline at the end."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def make(folder: Path) -> None:
    """Writes the checkpoint into an empty folder."""
    write_json(CONFIG, folder / "config.json")
    write_json(GENERATION_CONFIG, folder / "generation_config.json")
    write_json(TOKENIZER_CONFIG, folder / "tokenizer_config.json")
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text(README)
    (folder / "LICENSE").write_text(LICENSE)
    save_shards(weights(), folder)


if __name__ == "__main__":
    reproducible.main(reproducible.ROOT / "fixtures" / "tiny-qwen3-moe", make, __doc__)
