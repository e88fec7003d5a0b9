"""Parameter groups and the constructor's signature: from user's options to complete, checked group dicts."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from shampoo_deepspeed.config import OPTION_NAMES, ShampooConfig, canonical
from shampoo_deepspeed.option_names import ALIASES, GLOBAL_OPTIONS, IGNORED, ONLY_FALSE
from shampoo_deepspeed.validators import OptionError

logger = logging.getLogger("shampoo_deepspeed")

# What torch, its schedulers and DeepSpeed keep in groups beside options.
_HOSTS_OWN = ("params", "param_names", "initial_lr", "name", "moe", "shampoo_group")


def group_options(config: ShampooConfig) -> dict[str, Any]:
    """The options as a parameter group holds them."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def checked_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group with aliases replaced and all options present and checked; other keys stay, with a warning."""
    group = dict(group)
    own = {}
    for key in list(group):
        if key in OPTION_NAMES or key in ALIASES or key in IGNORED or key in ONLY_FALSE:
            own[key] = group.pop(key)
        elif key not in _HOSTS_OWN:
            if difflib.get_close_matches(key, OPTION_NAMES, n=1, cutoff=0.85):
                canonical({key: group[key]})  # raises
            logger.warning(
                "Shampoo has no option %r (= %r in a parameter group), and leaves it to whoever reads it there; "
                "options are %s",
                key,
                group[key],
                ", ".join(OPTION_NAMES),
            )
    options = {**{name: defaults[name] for name in OPTION_NAMES}, **canonical(own)}
    for name in GLOBAL_OPTIONS:
        if options[name] != defaults[name]:
            raise OptionError(
                f"Shampoo option {name!r} = {options[name]!r} in a parameter group is not allowed: all groups share "
                f"one value, here {defaults[name]!r}."
            )
    return {**group, **group_options(ShampooConfig.from_options(options).with_peak())}


def signature_with_options(function: Callable[..., Any]) -> inspect.Signature:
    """A method's signature with every option in place of ``**options``, so that help() and editors show them."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(ShampooConfig)
        if f.name != "lr"
    ]
    return inspect.Signature([*kept[1:], *options])
