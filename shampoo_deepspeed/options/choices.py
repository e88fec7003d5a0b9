"""What options may be: the names that they allow, and the patterns and rules that hold by default."""

from __future__ import annotations

from typing import Any

import torch

GRAFTING_METHODS = (
    "none",
    "sgd",
    "adagrad",
    "rmsprop",
    "adam",
    "normalized_adagrad",
    "normalized_rmsprop",
    "normalized_adam",
)
REFRESHES = ("sync", "staggered", "background")
DECAYS = ("l2", "decoupled", "corrected", "independent")
LARGE_DIMS = ("block", "diagonal", "identity", "adagrad")
SIDES = ("smaller", "left", "right")
SOLVERS = ("auto", "eigh", "coupled_newton", "newton_db")
PRECONDITIONERS = ("shampoo", "soap", "kl_shampoo")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WIDE_DTYPES = ("float32", "float64")  # in 16 bits a slow average neither decays nor takes small terms

# Embeddings and output heads have one row per token: their factor matrices would be huge and their gradients
# are sparse in rows, so every production system trains them element-wise. Routers see few and sparse gradients too, and
# norms and biases with more than one dim (of heads, of experts) are still lists of vectors.
DEFAULT_EXCLUDE = (
    "kind:embedding",
    "kind:lm_head",
    "*embed*",
    "*lm_head*",
    "*wte*",
    "*wpe*",
    "kind:router",
    "*router*",
    "*.gate.wg.*",
    "kind:norm",
    "*bias",
)
# What names_and_kinds and shapes can tell.
KINDS = ("embedding", "lm_head", "layernorm", "norm", "router", "experts", "0d", "1d", "2d", "3d", "4d", "5d")
# Stacked experts [experts, out, in] are matrices of their own.
DEFAULT_RULES: tuple[dict[str, Any], ...] = ({"match": ("kind:experts",), "batch_dims": 1},)

# The Hugging Face Trainer's own rule (Trainer.get_decay_parameter_names), as name patterns.
TRAINER_NO_DECAY = (
    "kind:layernorm",
    "*bias*",
    "*layernorm*",
    "*rmsnorm*",
    "norm",
    "norm.*",
    "*.norm",
    "*.norm.*",
    "*_norm",
    "*_norm.*",
)
