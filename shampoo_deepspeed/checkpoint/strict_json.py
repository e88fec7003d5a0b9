"""Parses JSON from strangers: strictly what the standard allows, and never more of it than a checkpoint needs."""

from __future__ import annotations

import json
import math
from typing import Any

DIGITS = 20  # of an integer; 64 bits have 19


def parse(content: bytes, most_values: int) -> Any:
    """The value of a JSON text.

    Args:
        most_values: more values than this are refused before any is built.

    Raises:
        ValueError: for anything else than JSON in UTF-8: also for NaN and infinite numbers, for a key that appears
            twice in an object, for numbers of more than 20 digits, and for too many or too deeply nested values.
    """
    found = sum(content.count(mark) for mark in (b",", b"[", b"{"))
    if found > most_values:
        raise ValueError(f"it has about {found:,} values, and at most {most_values:,} are read")
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_not_a_number,
        )
    except RecursionError:
        raise ValueError("its values are nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in made if names.count(name) > 1)
        raise ValueError(f"the key {twice[:100]!r} appears twice")
    return made


def _integer(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a number has {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _not_a_number(name: str) -> float:
    raise ValueError(f"{name} is not a number")
