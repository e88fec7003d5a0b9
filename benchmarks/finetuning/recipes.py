"""The contestants by name. A new recipe is one line in `RECIPES`, or the field "options" of a line of the queue."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.convergence.recipes import Recipe

RATES = (1e-4, 2e-4, 4e-4)
BETAS = [0.9, 0.99]
# Embeddings, heads and norms of a pre-trained model are good already, so they keep the common rate.
COMMON_RATE: dict[str, Any] = {"embedding_lr": None, "tied_embedding_lr": None, "elementwise_lr": 1.0}
# Options that are the same for all recipes of one kind; a recipe's own come on top.
SHARED: dict[str, dict[str, Any]] = {
    "adamw": {"betas": BETAS, "eps": 1e-8, "fused": True},
    "muon": {"betas": BETAS, "fused": True, "dtype": "bfloat16"},  # as torch's, and fast with AMX
    "shampoo": {"betas": BETAS, "max_preconditioner_dim": 256, "precondition_frequency": 10, **COMMON_RATE},
}
POWER_HALF: dict[str, Any] = {"preconditioner": "shampoo", "exponent_override": 2.0}

RECIPES: dict[str, Recipe] = {
    "adamw": Recipe("adamw", {}, RATES),
    "muon": Recipe("muon", {}, RATES),
    # What the package does without options, but for the rates of embeddings and norms.
    "shampoo": Recipe("shampoo", {}, RATES),
    "adam_length": Recipe("shampoo", {"grafting": "adam"}, RATES),
    "power_half": Recipe("shampoo", {**POWER_HALF, "grafting": "adam"}, RATES),
    "soap": Recipe("shampoo", {"preconditioner": "soap"}, RATES),
    # The presets as users set them. SHARED agrees with what they say of rates.
    "finetune": Recipe("shampoo", {"preset": "finetune"}, RATES),
    "lora": Recipe("shampoo", {"preset": "lora"}, RATES),
}


def all_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options on top of those that all of its kind share."""
    return SHARED[kind] | dict(options)
