"""Tiny Transformers models trained by a plain loop, equal in every process."""

from __future__ import annotations

from typing import Any

import torch

from tests.support.trainings import GLOBAL_BATCH, VOCABULARY, make_data

STEPS = 7


def tiny(kind: str) -> Any:
    """Build a Llama, or a Mixtral with four experts, each of which gets tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    shape: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(40)
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape))
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=4, num_experts_per_tok=2))


def steps_of(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Train for STEPS steps with the same whole batch on all ranks."""
    rows = make_data(STEPS)
    for step in range(STEPS):
        batch = rows[step * GLOBAL_BATCH : (step + 1) * GLOBAL_BATCH]
        loss = model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
