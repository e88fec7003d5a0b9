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
# What frameworks pass to every torch optimizer, and what DeepSpeed's JSONs for AdamW have. The first say with which
# kernels, which means nothing here, as all are already batched; the second change what a step does, so that only their
# default can be taken.
IGNORED = ("foreach", "fused", "torch_adam")
ONLY_FALSE = ("capturable", "differentiable", "maximize")
# Where a message leads that has no room for forty names.
ALL_OPTIONS = "All options: docs/options.md, or help(shampoo_deepspeed.Shampoo)."
NEAREST = 3
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
        if key in IGNORED:
            if value:
                logger.info("Shampoo ignores %r: its kernels are batched over blocks already", key)
            continue
        if key in ONLY_FALSE:
            if value:
                raise bad(key, value, "false; Shampoo has no such mode")
            continue
        name = ALIASES.get(key, key)
        if name not in names:
            raise OptionError(f"Unknown Shampoo option {key!r} = {short(value)}{nearest(key, names)}")
        if name in out:
            raise OptionError(f"Shampoo option {name!r} is given twice (as {key!r} = {short(value)} too).")
        out[name] = value
    return out


def nearest(key: str, names: Sequence[str]) -> str:
    """The end of a message about an unknown name: up to three that look like it, and where all of them are."""
    if key in INSTEAD:
        return f": {INSTEAD[key]}. {ALL_OPTIONS}"
    close = [repr(name) for name in difflib.get_close_matches(key, names, n=NEAREST, cutoff=CUTOFF)]
    hint = f"; did you mean {' or '.join(filter(None, (', '.join(close[:-1]), close[-1])))}?" if close else "."
    return f"{hint} {ALL_OPTIONS}"
