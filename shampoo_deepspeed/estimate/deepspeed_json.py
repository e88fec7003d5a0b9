"""What a DeepSpeed JSON says about a run: the ZeRO stage, the size of sub-groups, and the optimizer's options."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shampoo_deepspeed.estimate.expected_shards import SUB_GROUP_SIZE
from shampoo_deepspeed.options.checks import short
from shampoo_deepspeed.options.config import canonical
from shampoo_deepspeed.runtime import json_text

STAGES = {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}
AUTO = "auto"  # what the Trainer fills in, which keeps its default here


class DeepSpeedJsonError(ValueError):
    """A DeepSpeed JSON cannot be used; the message names file, key and value, and what is allowed."""


class Described(NamedTuple):
    """What a DeepSpeed JSON says.

    Args:
        framework: of ``expected_shards.FRAMEWORKS``.
        options: of the optimizer, under our names, values unchecked.
        sub_group_size: elements of one rank at which ZeRO-3 closes a sub-group.
    """

    framework: str
    options: dict[str, Any]
    sub_group_size: int


def read_deepspeed(path: str) -> Described:
    """Read a DeepSpeed JSON.

    Raises:
        DeepSpeedJsonError: if it cannot be read, or a value that counts here is not allowed.
        OptionError: for an option that is unknown.
    """
    try:
        found = json_text.read(Path(path))
    except (OSError, ValueError) as error:
        raise DeepSpeedJsonError(f"--ds-config {path!r} is not a JSON file that can be read: {error}") from None
    if not isinstance(found, dict):
        raise DeepSpeedJsonError(f"--ds-config {path!r} must hold one JSON object, not {short(found, 40)}")
    optimizer, zero = _object(path, found, "optimizer"), _object(path, found, "zero_optimization")
    kind = optimizer.get("type", "Shampoo")
    if str(kind).lower() != "shampoo":
        raise _bad(path, "optimizer.type", kind, "Shampoo")
    stage = zero.get("stage", 0)
    if type(stage) is not int or stage not in STAGES:
        raise _bad(path, "zero_optimization.stage", stage, "0, 1, 2 or 3")
    params = {} if optimizer.get("params") is None else _object(path, optimizer, "params", "optimizer.")
    options = canonical({name: value for name, value in params.items() if value != AUTO})
    return Described(STAGES[stage], options, _sub_group_size(path, zero))


def _object(path: str, of: Mapping[str, Any], key: str, prefix: str = "") -> Mapping[str, Any]:
    found = of.get(key, {})
    if not isinstance(found, dict):
        raise _bad(path, prefix + key, found, "a JSON object, or leave it out")
    return found


def _sub_group_size(path: str, zero: Mapping[str, Any]) -> int:
    """DeepSpeed takes numbers such as 1e9 too, and 0, with which each parameter is a sub-group."""
    size = zero.get("sub_group_size", AUTO)
    if size == AUTO:
        return SUB_GROUP_SIZE
    whole = type(size) is int or (type(size) is float and size.is_integer())
    if not whole or size < 0:
        raise _bad(path, "zero_optimization.sub_group_size", size, "an integer >= 0, or auto")
    return int(size)


def _bad(path: str, key: str, value: object, allowed: str) -> DeepSpeedJsonError:
    return DeepSpeedJsonError(f"--ds-config {path!r}: {key} = {short(value)} is not allowed: {allowed}")
