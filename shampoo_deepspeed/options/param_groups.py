"""Parameter groups and the constructor's signature: from user's options to complete, checked group dicts."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch

from shampoo_deepspeed.options.checks import OptionError, short
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.combinations import refuse_unused_peak
from shampoo_deepspeed.options.config import (
    GIVEN_NAMES,
    OPTION_NAMES,
    SHARED,
    ShampooConfig,
    canonical,
    options_with,
)
from shampoo_deepspeed.options.names import ALIASES, IGNORED, ONLY_FALSE
from shampoo_deepspeed.options.presets import MEMORIES, MEMORY, PRESET, PRESETS

# What torch, its schedulers and DeepSpeed keep in groups in addition to options.
_OTHERS_KEYS = {
    "params", "param_names", "initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum", "name", "moe",
    "shampoo_group",
}  # fmt: skip
# Keys of groups that are no options of somebody else's: ours, what says which group it is, and DeepSpeed's note of
# where the state is.
KEYS_OF_GROUPS = frozenset(
    {*OPTION_NAMES, "params", "param_names", "name", "moe", "shampoo_group", "shampoo_checkpoint"}
)
_OWN = {*GIVEN_NAMES, *ALIASES, *IGNORED, *ONLY_FALSE}


def group_options(config: ShampooConfig) -> dict[str, Any]:
    """The options as a parameter group holds them."""
    return {f.name: getattr(config, f.name) for f in fields(config)}


def kept_by_others(group: Mapping[str, Any]) -> dict[str, Any]:
    """What schedulers and users keep in a group in addition to options, in JSON types; other values are left out.

    What says which group it is stays out too.
    """
    found = {key: _in_json(value) for key, value in group.items() if key not in KEYS_OF_GROUPS}
    return {key: value for key, value in found.items() if value is not _NOT_JSON}


_NOT_JSON = object()
# What JSON has no other form for: an object with just these keys. Schedulers keep such tensors if lr is one.
SCALAR, DTYPE = "tensor of 0 dims", "dtype"
NOT_FINITE, NOT_FINITES = "number", ("inf", "-inf", "nan")
FORMS = ({SCALAR, DTYPE}, {NOT_FINITE})


def _in_json(value: Any) -> Any:
    """A number, a string, None or a list or dict of these, in JSON types; `_NOT_JSON` for anything else."""
    if isinstance(value, float) and not math.isfinite(value):
        return {NOT_FINITE: str(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        inner = [_in_json(item) for item in value]
        return _NOT_JSON if _NOT_JSON in inner else inner
    if isinstance(value, Mapping):
        named = {key: _in_json(item) for key, item in value.items()}
        fits = all(isinstance(key, str) for key in named) and _NOT_JSON not in named.values()
        return named if fits and set(named) not in FORMS else _NOT_JSON
    if isinstance(value, torch.Tensor) and value.ndim == 0 and _name(value.dtype) in DTYPES:
        return {SCALAR: _in_json(value.item()), DTYPE: _name(value.dtype)}
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # numpy's
        return _in_json(value.item())
    return _NOT_JSON


def from_json(value: Any) -> Any:
    """A value as `kept_by_others` found it, but lists for tuples."""
    if isinstance(value, Mapping) and set(value) == {SCALAR, DTYPE}:
        with torch.inference_mode(False):  # a scheduler will change it in place
            return torch.tensor(float(from_json(value[SCALAR])), dtype=DTYPES[value[DTYPE]], device="cpu")
    if isinstance(value, Mapping) and set(value) == {NOT_FINITE}:
        return float(value[NOT_FINITE])
    if isinstance(value, list):
        return [from_json(item) for item in value]
    return {key: from_json(item) for key, item in value.items()} if isinstance(value, Mapping) else value


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unknown_keys(group: Mapping[Any, Any]) -> set[Any]:
    """Keys of a group that neither this package nor a framework that it knows reads; they may be no text."""
    return {key for key in group if key not in _OTHERS_KEYS and key not in _OWN}


def checked_group(group: dict[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A group with aliases and a preset replaced and all options present and checked; other keys stay."""
    group = dict(group)
    own = {}
    for key in list(group):
        if key in _OWN:
            own[key] = group.pop(key)
        elif key in unknown_keys(group) and difflib.get_close_matches(str(key), GIVEN_NAMES, n=1, cutoff=0.85):
            canonical({key: group[key]})  # raises
    own = canonical(own)
    options = {**{name: defaults[name] for name in OPTION_NAMES}, **own}
    for name in options_with(SHARED):
        if options[name] != defaults[name]:
            raise OptionError(
                f"Shampoo option {name!r} = {short(options[name])} in a parameter group is not allowed: all groups "
                f"share one value, here {defaults[name]!r}."
            )
    config = ShampooConfig.from_options(options)
    if "peak_lr" in own:
        refuse_unused_peak(config)
    return {**group, **group_options(config.with_peak())}


def printed_group(number: int, group: Mapping[str, Any]) -> str:
    """A group as ``repr`` shows it: its size, ``lr``, and what is not as by default."""
    defaults, count = group_options(ShampooConfig()), len(group["params"])
    changed = [name for name in OPTION_NAMES if name == "lr" or not _equal(group[name], defaults[name])]
    lines = [f"    {name}: {short(group[name])}" for name in changed]
    return "\n".join([f"Parameter Group {number}: {count} tensor{'s' * (count != 1)}", *lines])


def _equal(value: object, default: object) -> bool:
    return list(value) == list(default) if isinstance(value, list) and isinstance(default, tuple) else value == default


def signature_with_options(function: Callable[..., Any]) -> inspect.Signature:
    """A signature with every option in place of ``**options`` and without ``self``, for help() and notebooks."""
    own = inspect.signature(function)
    kept = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD and p.name != "self"]
    options = [
        inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
        for f in fields(ShampooConfig)
        if f.name != "lr"
    ]
    presets = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_names_of(found))
        for name, found in ((PRESET, PRESETS), (MEMORY, MEMORIES))
    ]
    return inspect.Signature([*kept, *presets, *options])


def _names_of(presets: Mapping[str, Any]) -> str:
    return f"Literal[{', '.join(map(repr, presets))}] | None"
