"""Names of options: those that other packages use for them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from shampoo_deepspeed.options.checks import OptionError, bad, short

logger = logging.getLogger(__name__)

# Names that other packages use for the same thing.
ALIASES = {
    "grafting_epsilon": "eps",
    "use_decoupled_weight_decay": "decoupled_weight_decay",
    "use_nesterov": "nesterov",
    "grafting_type": "grafting",
}
# Options of other optimizers that have no counterpart of the same meaning here, with what to do instead.
INSTEAD = {
    "learning_rate": "the learning rate is 'lr'",
    "distributed_config": "leave it out, because shards are found automatically",
}
# Names in other Shampoos, SOAPs and general optimizers of what has another name here. The values may have another form,
# so that they are not aliases.
COUNTERPARTS = {
    "max_precond_dim": "max_preconditioner_dim",
    "block_size": "max_preconditioner_dim",
    "merge_dims": "merge_small_dims",
    "use_merge_dims": "merge_small_dims",
    "update_freq": "precondition_frequency",
    "preconditioning_compute_steps": "precondition_frequency",
    "statistics_compute_steps": "statistics_frequency",
    "precondition_warmup_steps": "start_preconditioning_step",
    "start_preconditioning": "start_preconditioning_step",
    "preconditioner_config": "preconditioner",
    "preconditioner_type": "preconditioner",
    "preconditioner_dtype": "factor_dtype",
    "factor_matrix_dtype": "factor_dtype",
    "inv_factor_matrix_dtype": "root_dtype",
    "inv_root_override": "exponent_override",
    "inverse_exponent_override": "exponent_override",
    "shampoo_beta": "factor_beta",
    "moving_average_beta": "betas",
    "beta1": "betas",
    "beta2": "betas",
    "grafting_beta": "grafting_beta2",
    "graft_type": "grafting",
    "grafting_config": "grafting",
    "matrix_eps": "epsilon",
    "diagonal_eps": "eps",
    "wd": "weight_decay",
    "weight_decouple": "decoupled_weight_decay",
    "correct_bias": "use_bias_correction",
    "normalize_grads": "normalize_gradients",
    "normalize_grad": "normalize_gradients",
}
# Options that configurations keep when only the optimizer's name in them is changed, by whose they are. DeepSpeed's
# first, which are in "params" of its JSON.
FOREIGN = {
    "Adam": (
        "adam_w_mode", "bias_correction", "amsgrad", "max_grad_norm", "set_grad_none", "fp32_optimizer_states",
        "adamw_mode", "momentum_decay",
    ),
    "a 1-bit optimizer": (
        "freeze_step", "cuda_aware", "comm_backend_name", "var_freeze_step", "var_update_scaler", "local_step_scaler",
        "local_step_clipper", "coeff_beta", "factor_max", "factor_min", "factor_threshold",
    ),
    "LAMB": ("max_coeff", "min_coeff", "eps_inside_sqrt", "trust_clip", "always_adapt", "use_nvlamb"),
    "Lion": ("use_triton", "cautious"),
    "Adagrad": ("lr_decay", "initial_accumulator_value"),
    "Muon": (
        "ns_steps", "ns_coefficients", "ns_method", "newton_schulz_steps", "backend_steps", "adjust_lr_fn", "muon_lr",
        "adam_lr", "muon_momentum", "use_muon", "adamw_betas", "adamw_eps", "adamw_wd", "adam_betas", "adam_eps",
    ),
    "RMSprop": ("alpha", "centered"),
    "Adafactor": ("clip_threshold", "decay_rate", "scale_parameter", "relative_step", "warmup_init", "beta2_decay"),
    "bitsandbytes": ("optim_bits", "min_8bit_size", "percentile_clipping", "block_wise", "is_paged", "args"),
    "Sophia": ("rho", "hessian_power"),
    "another SOAP": ("precondition_1d", "data_format"),
    "another Shampoo": (
        "use_protected_eigh", "exponent_multiplier", "num_trainers_per_group", "track_root_inv_residuals",
        "use_normalized_grafting", "shampoo_pt2_compile_config", "precision_config",
        "preconditioner_computation_config", "skip_preconditioning_rank_lt",
        "no_preconditioning_for_layers_with_dim_gt", "shape_interpretation", "pre_conditioner_type", "use_svd",
    ),
}  # fmt: skip
_OWNERS = {key: owner for owner, keys in FOREIGN.items() for key in keys}
# What frameworks pass to every torch optimizer, and what DeepSpeed's JSONs for AdamW have. The first say with which
# kernels, which means nothing here, as all are already batched; the second change what a step does, so that only their
# default can be taken.
IGNORED = ("foreach", "fused", "torch_adam")
ONLY_FALSE = ("capturable", "differentiable", "maximize")
# Where a message leads that has no room for forty names.
ALL_OPTIONS = "All options: docs/options.md, or help(shampoo_deepspeed.Shampoo)."
NEAREST = 3
BRIEF = 40  # characters of each value where a message names several
CUTOFF = 0.6  # of difflib's ratio, for a name to be near


def renamed(options: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Options under our names, values unchecked; aliases are replaced.

    What torch's own optimizers take and this one has no use for is left out.

    Args:
        names: of all options.

    Raises:
        OptionError: a name that is unknown or given twice, or a mode of torch's that is asked for and not there.
    """
    out: dict[str, Any] = {}
    for key, value in options.items():
        if not isinstance(key, str):
            raise OptionError(f"Unknown Shampoo option {short(key)} = {short(value)}{nearest(key, names)}")
        if key in IGNORED:
            if not _is_off(value):
                logger.info("Shampoo ignores %r: its kernels are batched over blocks already", key)
            continue
        if key in ONLY_FALSE:
            if not _is_off(value):
                raise bad(key, value, "false; Shampoo has no such mode")
            continue
        name = ALIASES.get(key, key)
        if name not in names:
            _refuse_foreign(options)
            raise OptionError(f"Unknown Shampoo option {key!r} = {short(value)}{nearest(key, names)}")
        if name in out:
            raise OptionError(f"Shampoo option {name!r} is given twice (as {key!r} = {short(value)} too).")
        out[name] = value
    return out


def _is_off(value: object) -> bool:
    """Whether a switch is off; what has no truth value, such as an array, is not."""
    try:
        return not value
    except Exception:  # whatever the value's own method raises
        return False


def _refuse_foreign(options: Mapping[str, Any]) -> None:
    """Raise OptionError if options are another optimizer's; it names all of them, so that one look is enough."""
    theirs: dict[str, list[str]] = {}
    for key in options:
        if key in _OWNERS:
            theirs.setdefault(_OWNERS[key], []).append(f"{key!r} = {short(options[key], BRIEF)}")
    if theirs:
        of = "; ".join(f"of {owner}: {', '.join(keys)}" for owner, keys in theirs.items())
        raise OptionError(f"Shampoo does not have these options of other optimizers, delete them ({of}). {ALL_OPTIONS}")


def nearest(key: object, names: Sequence[str]) -> str:
    """The end of a message about an unknown name: up to three that look like it, and where all of them are."""
    if not isinstance(key, str):
        return f": names of options are text. {ALL_OPTIONS}"
    if key in INSTEAD:
        return f": {INSTEAD[key]}. {ALL_OPTIONS}"
    if key in _OWNERS:
        return f": it is an option of {_OWNERS[key]}; delete it. {ALL_OPTIONS}"
    if key in COUNTERPARTS:
        return f": here it is {COUNTERPARTS[key]!r}. {ALL_OPTIONS}"
    close = [repr(name) for name in difflib.get_close_matches(key.lower(), names, n=NEAREST, cutoff=CUTOFF)]
    hint = f"; did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?" if close else "."
    return f"{hint} {ALL_OPTIONS}"
