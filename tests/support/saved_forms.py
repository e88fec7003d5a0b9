"""Options that give an optimizer's state different parts, dtypes and shapes."""

from __future__ import annotations

from typing import Any

from tests.support.bare import BARE

FORMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "averages": {"ema_decay": 0.9},
    "one_moment": {"betas": (0.0, 0.99)},
    "other_dtypes": {"factor_dtype": "float64", "root_dtype": "bfloat16"},
    "adagrad": {"betas": (0.9, 1.0), "grafting": "adagrad"},
    "ungrafted": {"grafting": "none"},
    "one_sided": {"preconditioner": "shampoo", "one_sided": "smaller"},
    "diagonals": {
        "preconditioner": "shampoo",
        "large_dim": "diagonal",
        "beta3": 0.5,
        "weight_decay_type": "corrected",
    },
    "adagrad_where_large": {"large_dim": "adagrad"},
    "rules": {
        "rules": [
            # Blocks with the shape of others, but with other state.
            {"match": "mix.weight", "preconditioner": "shampoo", "one_sided": "left"},
            {"match": "down.weight", "split": [4, 5], "grafting": "sgd"},
            {"match": "conv.weight", "batch_dims": 1, "merge_small_dims": False},
        ]
    },
    "soap": {"preconditioner": "soap"},
    "bare": BARE,
    "kept_bases": {"refresh_tolerance": 0.5},
    "qr": {"solver": "qr"},
    "kl_soap": {"preconditioner": "kl_soap"},
    "muon": {"preconditioner": "muon"},
    "packed": {"factor_format": "packed", "root_format": "packed"},
    "memory_adamw": {"memory": "adamw"},
    "memory_half": {"memory": "half"},
    "soap_bfloat16": {"preconditioner": "soap", "root_format": "bfloat16", "moment_format": "bfloat16"},
    "soap_half": {"preconditioner": "soap", "memory": "half", "grafting": "adam"},
}
