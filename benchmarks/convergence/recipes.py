"""The contestants by name. A new recipe is one line in `RECIPES`, or the field "options" of a line of the queue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from benchmarks.convergence.muon import Muon
from benchmarks.convergence.variants import NAMES, Around
from shampoo_deepspeed import Shampoo

Stepping = torch.optim.Optimizer | Around
WEIGHT_DECAY = 0.1  # of matrices, embeddings included; none of norms and biases


@dataclass(frozen=True)
class Recipe:
    """What builds the optimizer, with which options, and the rates where its search begins."""

    kind: str  # adamw, muon or shampoo
    options: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = (3e-3, 5e-3, 8e-3)


# Lists and not tuples, so that options are equal to what a results file holds.
ADAMW: dict[str, Any] = {"betas": [0.9, 0.95], "eps": 1e-8}
# What all recipes of ours share; a recipe's own options come on top.
SHAMPOO: dict[str, Any] = {"betas": [0.9, 0.95], "max_preconditioner_dim": 256, "precondition_frequency": 10}
# Those below are complete, so that a new default changes none of them.
BARE: dict[str, Any] = {
    "factor_beta": None,
    "early_relative_epsilon": 0.0,
    "refresh_growth": 0.0,
    "statistics_frequency": 1,
    "grafting": "adam",
    "elementwise_lr": 1.0,
    "embedding_lr": None,
    "tied_embedding_lr": None,
    "normalize_gradients": False,
}
KL: dict[str, Any] = {**BARE, "preconditioner": "kl_shampoo", "relative_epsilon": 1e-4}
RECIPE: dict[str, Any] = {
    "preconditioner": "kl_shampoo",
    "factor_beta": 0.95,
    "relative_epsilon": 1e-4,
    "early_relative_epsilon": 0.01,
    "refresh_growth": 0.25,
    "statistics_frequency": 2,
    "grafting": "rms",
    "elementwise_lr": 3.0,
    "embedding_lr": 32.0,
    "tied_embedding_lr": 6.0,
    "normalize_gradients": True,
}

RECIPES: dict[str, Recipe] = {
    "adamw": Recipe("adamw", {}, (5e-4, 8e-4, 1.2e-3, 2e-3, 3e-3)),
    # What a larger rate of the embeddings alone would do for AdamW and Muon.
    "adamw_e24": Recipe("adamw", {"embedding_lr": 24.0}, (8e-4, 1.2e-3, 2e-3)),
    "muon_e24": Recipe("muon", {"embedding_lr": 8.0, "rest": 3.0}, (2e-3, 3e-3, 5e-3)),
    "adamw_b99": Recipe("adamw", {"betas": [0.9, 0.99]}, (5e-4, 8e-4, 1.2e-3, 2e-3, 3e-3)),
    "muon": Recipe("muon", {}, (3e-3, 5e-3, 8e-3)),
    # Whatever the package does without options; --quick checks it.
    "default": Recipe("shampoo", {}, (1.2e-3, 2e-3, 3e-3)),
    "recipe": Recipe("shampoo", RECIPE, (1.2e-3, 2e-3, 3e-3)),
    "shampoo_p4": Recipe(
        "shampoo",
        {**BARE, "preconditioner": "shampoo", "exponent_override": [2.0, 4.0], "relative_epsilon": 1e-6},
        (2e-3, 3e-3, 5e-3),
    ),
    "shampoo_p2": Recipe(
        "shampoo", {**BARE, "preconditioner": "shampoo", "exponent_override": 2.0, "relative_epsilon": 1e-4}
    ),
    "kl": Recipe("shampoo", KL),
    "kl_start2_freq2": Recipe("shampoo", KL | {"start_preconditioning_step": 2, "precondition_frequency": 2}),
    "soap": Recipe("shampoo", {**BARE, "grafting": "none", "preconditioner": "soap", "relative_epsilon": 1e-6}),
    "soap_eps4": Recipe("shampoo", {**BARE, "grafting": "none", "preconditioner": "soap", "relative_epsilon": 1e-4}),
}


def token_embeddings(model: nn.Module) -> list[nn.Parameter]:
    """The input embeddings of a model whose head has a weight of its own, else nothing."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    return [] if table.weight is head.weight else [table.weight]


def all_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's options on top of those that all of its kind share."""
    shared: dict[str, dict[str, Any]] = {"adamw": ADAMW, "muon": {"betas": [0.9, 0.95]}, "shampoo": SHAMPOO}
    return shared[kind] | dict(options)


def is_hidden(name: str) -> bool:
    """Whether a matrix of this name is neither an embedding nor the head."""
    return not any(word in name for word in ("embed", "lm_head", "wte", "wpe"))


def build_optimizers(
    kind: str, options: Mapping[str, Any], lr: float, model: nn.Module, weight_decay: float = WEIGHT_DECAY
) -> list[Stepping]:
    """The optimizers of a model's trainable parameters; each has all of its options from `all_options`."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decayed = [(n, p) for n, p in trained if p.ndim > 1]
    rest = [(n, p) for n, p in trained if p.ndim <= 1]
    options = dict(options)
    hidden = [(n, p) for n, p in decayed if is_hidden(n)]
    if kind == "shampoo":
        around = {name: options.pop(name) for name in NAMES if name in options}
        free = around.get("cautious_decay") or around.get("hyperball")  # decayed otherwise, or not at all
        parts = [(hidden, 0.0 if free else weight_decay)]
        parts += [([(n, p) for n, p in decayed if not is_hidden(n)], weight_decay), (rest, 0.0)]
        groups = [{"params": part, "weight_decay": decay} for part, decay in parts if part]
        optimizer = Shampoo(groups, model=model, lr=lr, **options)
        return [Around(optimizer, [p for _, p in hidden], weight_decay, **around) if around else optimizer]
    optimizers: list[Stepping] = []
    if kind == "muon":
        own = {name: options.pop(name) for name in ("momentum", "scale", "iterations", "dtype") if name in options}
        optimizers.append(Muon(hidden, lr, weight_decay=weight_decay, **own))
        lr *= options.pop("rest", 1.0)  # the rate of all other parameters, as a factor
        known = {id(p) for _, p in hidden}
        decayed = [(n, p) for n, p in decayed if id(p) not in known]
    # The rate of token embeddings, as a factor: what our `embedding_lr` is to them.
    factor, tables = options.pop("embedding_lr", 1.0), {id(p) for p in token_embeddings(model)}
    groups = [
        {"params": [p for _, p in decayed if id(p) not in tables], "weight_decay": weight_decay},
        {"params": [p for _, p in decayed if id(p) in tables], "weight_decay": weight_decay, "lr": lr * factor},
        {"params": [p for _, p in rest], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        options.setdefault("foreach", not options.get("fused", False))
        optimizers.append(torch.optim.AdamW(groups, lr=lr, **options))
    return optimizers
