"""What Transformers models are treated like if nobody names their parameters: embeddings and heads are left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from shampoo_deepspeed import Shampoo

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


class Holding(nn.Module):
    """A user's module that holds a model beside a layer of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.own = model, nn.Linear(2, 2)


def policies_of(optimizer: Shampoo, prefix: str = "") -> dict[str, Any]:
    own = {e.parameter.key: (e.parameter.kinds, optimizer.policies[e.parameter.key]) for e in optimizer.entries}
    return {name.removeprefix(prefix): found for name, found in own.items() if name.startswith(prefix)}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_treated_as_if_they_had_been_named(name: str) -> None:
    build, heads, tokens = MODELS[name]
    model = build()
    wanted = policies_of(Shampoo([(n, p) for n, p in model.named_parameters() if p.requires_grad], model=model))
    assert {n for n, (kinds, _) in wanted.items() if "lm_head" in kinds} == heads
    assert {n for n, (_, policy) in wanted.items() if policy.rate == "embedding_lr"} == tokens
    trained = [p for p in model.parameters() if p.requires_grad]
    halves = [{"params": trained[::2]}, {"params": trained[1::2]}]
    assert policies_of(Shampoo(trained)) == wanted
    assert policies_of(Shampoo(p for p in model.parameters() if p.requires_grad)) == wanted
    grouped = policies_of(Shampoo(halves))
    assert {n: kinds for n, (kinds, _) in grouped.items()} == {n: kinds for n, (kinds, _) in wanted.items()}
    held = Holding(model)
    names = [(n, p) for n, p in held.named_parameters() if p.requires_grad]
    for found in (Shampoo([p for _, p in names]), Shampoo(names), Shampoo(names, model=held)):
        assert policies_of(found, "model.") == wanted
