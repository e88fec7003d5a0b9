"""Tiny Transformers models of many kinds, with what must be recognised in each if nobody names its parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CAUSAL = transformers.AutoModelForCausalLM.from_config


def llama(**more: Any) -> nn.Module:
    return CAUSAL(transformers.LlamaConfig(**SIZES, **more))


def t5() -> nn.Module:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=96, **sizes))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, tie_word_embeddings=False))


def vit() -> nn.Module:
    sizes = {name: size for name, size in SIZES.items() if name not in ("vocab_size", "num_key_value_heads")}
    return transformers.ViTForImageClassification(transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def lora() -> nn.Module:
    return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))


# For each model the parameters that are known as output heads, and those that embed tokens only.
MODELS: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "gpt2": (
        lambda: CAUSAL(transformers.GPT2Config(vocab_size=96, n_embd=16, n_layer=1, n_head=2, n_positions=8)),
        {"transformer.wte.weight"},
        set(),
    ),
    "llama tied": (lambda: llama(tie_word_embeddings=True), {"model.embed_tokens.weight"}, set()),
    "llama": (lambda: llama(tie_word_embeddings=False), {"lm_head.weight"}, {"model.embed_tokens.weight"}),
    "qwen2": (
        lambda: CAUSAL(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)),
        {"model.embed_tokens.weight"},
        set(),
    ),
    "mixtral": (
        lambda: CAUSAL(transformers.MixtralConfig(**SIZES, num_local_experts=2)),
        {"lm_head.weight"},
        {"model.embed_tokens.weight"},
    ),
    "t5": (t5, {"shared.weight"}, set()),
    "bert": (bert, {"cls.predictions.decoder.weight"}, {"bert.embeddings.word_embeddings.weight"}),
    "vit": (vit, set(), set()),
    "lora": (lora, {"base_model.model.lm_head.modules_to_save.default.weight"}, set()),
}


def policies_of(optimizer: BlockOptimizer, prefix: str = "") -> dict[str, Any]:
    own = {e.parameter.key: (e.parameter.kinds, optimizer.policies[e.parameter.key]) for e in optimizer.entries}
    return {name.removeprefix(prefix): found for name, found in own.items() if name.startswith(prefix)}
