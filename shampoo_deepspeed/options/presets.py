"""Presets: names that stand for the options of a published algorithm, or of a kind of training.

A further preset is one entry of ``PRESETS``. Tests then ask for its name in ``typed.py`` and its table in
docs/options.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shampoo_deepspeed.options.checks import bad

PRESET = "preset"

# A preset sets all options that make up the algorithm, also those that equal the package's defaults. So it means the
# same in a group or rule that would otherwise have other options. It does not set what frameworks fill in by "auto"
# (lr, betas, eps, weight_decay), how parameters are cut into blocks, how often blocks refresh, and dtypes.
_OF_ALL: dict[str, Any] = {  # of our own presets
    "epsilon": 1e-12,
    "relative_epsilon": 1e-4,
    "damping": "shift",
    "shrinkage": 0.0,
    "solver": "auto",
    "beta3": None,  # betas[0]
    "use_bias_correction": True,
    "refresh": "staggered",
    "refresh_tolerance": None,
    "elementwise": None,  # Adam
    "decoupled_weight_decay": True,
    "weight_decay_type": None,
}
_NEAR_ADAM: dict[str, Any] = {  # what has been measured on pre-trained models
    "early_relative_epsilon": 0.0,
    "factor_beta": 0.95,  # whatever betas are: a Trainer's "auto" gives 0.999
    "statistics_frequency": 1,
    "refresh_growth": 0.0,
    "elementwise_lr": 1.0,
    "embedding_lr": None,
    "tied_embedding_lr": None,
    "normalize_gradients": False,
}
PRESETS: dict[str, dict[str, Any]] = {
    # Distributed Shampoo: arXiv 2309.06497 with the defaults of its code (github.com/facebookresearch/optimizers).
    # Grafting is off there by default; its README moves AdamW's runs to Adam's grafting and keeps their betas.
    "paper": {
        "preconditioner": "shampoo",
        "exponent_override": None,  # the root p = 2k for k dims
        "epsilon": 1e-12,  # absolute, added to all eigenvalues
        "relative_epsilon": 0.0,
        "early_relative_epsilon": 0.0,
        "damping": "shift",
        "shrinkage": 0.0,
        "solver": "eigh",
        "factor_beta": None,  # betas[1]
        "beta3": None,  # betas[0]
        "use_bias_correction": True,
        "statistics_frequency": 1,
        "refresh": "sync",
        "refresh_growth": 0.0,
        "refresh_tolerance": None,
        "grafting": "adam",
        "elementwise": None,  # Adam too
        "elementwise_lr": 1.0,
        "embedding_lr": None,
        "tied_embedding_lr": None,
        "normalize_gradients": False,
        "decoupled_weight_decay": True,
        "weight_decay_type": None,
    },
    # Training from new weights, by measurement: docs/convergence.md. These are the defaults.
    "pretrain": {
        "preconditioner": "kl_shampoo",
        **_OF_ALL,
        "exponent_override": None,  # p = 2
        "early_relative_epsilon": 0.01,
        "factor_beta": 0.95,
        "statistics_frequency": None,  # 2
        "refresh_growth": None,  # 0.25
        "grafting": None,  # rms
        "elementwise_lr": 3.0,
        "embedding_lr": 32.0,
        "tied_embedding_lr": 9.0,
        "normalize_gradients": True,
    },
    # All weights of a model that AdamW has trained: docs/fine-tuning.md. SOAP was the nearest to AdamW at equal rates.
    "finetune": {"preconditioner": "soap", **_OF_ALL, **_NEAR_ADAM, "exponent_override": None, "grafting": None},
    # Adapters: docs/fine-tuning.md. Each block's update has the length of Adam's.
    "lora": {
        "preconditioner": "shampoo",
        **_OF_ALL,
        **_NEAR_ADAM,
        "exponent_override": 2.0,
        "grafting": "adam",
    },
}


# How much state there is. Bytes for each parameter of a large square block with the default recipe: 20, 7.04 and 3.10;
# for each element-wise parameter: 8, 8 (AdamW's own) and 4.
MEMORY = "memory"
MEMORIES: dict[str, dict[str, Any]] = {
    "full": {
        "factor_format": "float32",
        "root_format": "float32",
        "moment_format": "float32",
        "elementwise_format": "float32",
    },
    # Factor matrices keep all bits, as roots magnify the errors of their small eigenvalues.
    "adamw": {
        "factor_format": "packed",
        "root_format": "int8",
        "moment_format": "bfloat16",
        "elementwise_format": "float32",
    },
    "half": {
        "factor_format": "int8",
        "root_format": "int8",
        "moment_format": "int8",
        "elementwise_format": "bfloat16",
    },
}


def without_preset(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with those of presets in place of their names; options that are given take precedence over these.

    Raises:
        OptionError: for a preset that is unknown.
    """
    found = {name: value for name, value in options.items() if name not in (PRESET, MEMORY)}
    for name, presets in ((PRESET, PRESETS), (MEMORY, MEMORIES)):
        chosen = options.get(name)
        if chosen is None:
            continue
        if not isinstance(chosen, str) or chosen.lower() not in presets:
            raise bad(name, chosen, f"null or one of {', '.join(presets)}")
        found = {**presets[chosen.lower()], **found}
    return found
