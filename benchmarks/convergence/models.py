"""The models that are trained, with new weights: two architectures at two sizes, and small ones for tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Cell:
    """One architecture at one size."""

    architecture: str
    hidden: int
    layers: int


CELLS = {
    "llama-4m": Cell("llama", 256, 4),
    "gpt2-4m": Cell("gpt2", 256, 4),
    "llama-15m": Cell("llama", 512, 4),
    "gpt2-15m": Cell("gpt2", 512, 4),
    "llama-1m": Cell("llama", 128, 4),
    "llama-tiny": Cell("llama", 64, 2),
    "gpt2-tiny": Cell("gpt2", 64, 2),
}


def build_model(cell: str, vocabulary: int, length: int, seed: int) -> nn.Module:
    """Llama with separate embedding and head, or GPT-2 with learned positions, tied head and no dropout."""
    torch.manual_seed(seed)
    shape = CELLS[cell]
    model: nn.Module
    if shape.architecture == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocabulary,
                hidden_size=shape.hidden,
                intermediate_size=shape.hidden * 8 // 3 // 16 * 16,
                num_hidden_layers=shape.layers,
                num_attention_heads=max(2, shape.hidden // 64),
                max_position_embeddings=length,
                tie_word_embeddings=False,
            )
        )
    else:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary,
                n_embd=shape.hidden,
                n_layer=shape.layers,
                n_head=max(2, shape.hidden // 64),
                n_positions=length,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    return model.train()
