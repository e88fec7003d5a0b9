"""Allowed values of options, and the default patterns and rules."""

from __future__ import annotations

from typing import Any

import torch

from shampoo_deepspeed.options.family import FAMILY

ELEMENTWISE_METHODS = (
    "none",
    "sgd",
    "adagrad",
    "rmsprop",
    "adam",
    "normalized_adagrad",
    "normalized_rmsprop",
    "normalized_adam",
)
GRAFTING_METHODS = (*ELEMENTWISE_METHODS, "rms")  # rms is a length without a method of its own
REFRESHES = ("sync", "staggered", "background")
DECAYS = ("l2", "decoupled", "corrected", "independent")
LARGE_DIMS = ("block", "diagonal", "identity", "adagrad")
SIDES = ("smaller", "left", "right")
DAMPINGS = ("shift", "cutoff", "saturate")
SOLVERS = ("auto", "eigh", "qr", "coupled_newton")
OF_BASES = ("auto", "eigh", "qr")  # the solvers that compute eigenbases
PRECONDITIONERS = tuple(FAMILY)
MATMUL_PRECISIONS = ("highest", "high", "medium")  # torch's words, see linalg.precision.rounded
FORMATS = ("float32", "packed", "bfloat16", "int8")  # of state; float32 stands for any dtype as it is
MOMENT_FORMATS = ("float32", "bfloat16", "int8")
ELEMENTWISE_FORMATS = ("float32", "bfloat16")  # why not int8: see algorithm.elementwise
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
WIDE_DTYPES = ("float32", "float64")  # in 16 bits a slow average neither decays nor registers small terms

# Embeddings and output heads have one row per token. Their factor matrices would be huge, and their gradients are
# sparse in rows, so every production system trains them element-wise. Routers get few and sparse gradients too. Norms
# and biases with more than one dim (of heads, of experts) are still lists of vectors.
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
# Kinds that names_and_kinds and shapes can distinguish.
KINDS = ("embedding", "tokens", "lm_head", "layernorm", "norm", "router", "experts", "0d", "1d", "2d", "3d", "4d", "5d")
# Stacked experts [experts, out, in] are separate matrices.
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
