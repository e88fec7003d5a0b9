"""Checks of single values: each takes an option's name and value, and returns the value to keep or raises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Check = Callable[[str, object], Any]
LONGEST = 500  # characters of a value in an error


class OptionError(ValueError):
    """An option has an unknown name or a value that is not allowed; the message names key, value and what is
    allowed."""

    allowed = ""


def short(value: object) -> str:
    """A value's ``repr``, cut so that an error fits on a screen."""
    text = repr(value)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}... ({len(text):,} characters)"


def bad(key: str, value: object, allowed: str) -> OptionError:
    """The error for a value that is not allowed; ``allowed`` says what is."""
    error = OptionError(f"Shampoo option {key!r} = {short(value)} is not allowed: {allowed}.")
    error.allowed = allowed
    return error


def _hinted(allowed: str, value: object) -> str:
    return f"{allowed}; only the Hugging Face Trainer fills in 'auto'" if value == "auto" else allowed


def number(key: str, value: object, low: float, high: float, allowed: str) -> float:
    """A number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad(key, value, _hinted(allowed, value))
    if not low <= value <= high:  # NaN fails too
        raise bad(key, value, allowed)
    return float(value)


def non_negative(key: str, value: object) -> float:
    return number(key, value, 0.0, 1e300, "a number >= 0")


def positive(key: str, value: object) -> float:
    return number(key, value, 1e-300, 1e300, "a number > 0")


def learning_rate(key: str, value: object) -> float | Tensor:
    if isinstance(value, Tensor):
        known = value.numel() == 1 and value.device.type == "cpu"  # reading it on a device would wait
        if value.numel() != 1 or (known and not 0.0 <= float(value.detach()) <= 1e300):
            raise bad(key, value, "a number >= 0 or a Tensor with one such element")
        return value
    return non_negative(key, value)


def positive_int(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise bad(key, value, "an integer >= 1")
    return value


def start_step(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise bad(key, value, "an integer >= 1, or -1 (precondition_frequency, or 2 with refresh_growth)")
    return value


def fraction(key: str, value: object) -> float:
    found = number(key, value, 0.0, 1.0, "a number in [0, 1)")
    if found == 1.0:
        raise bad(key, value, "a number in [0, 1)")
    return found


def beta_pair(key: str, value: object) -> tuple[float, float]:
    allowed = "two numbers [beta1, beta2] with 0 <= beta1 < 1 and 0 < beta2 <= 1 (1: an AdaGrad sum)"
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise bad(key, value, _hinted(allowed, value))
    try:
        beta1, beta2 = (number(key, v, 0.0, 1.0, allowed) for v in value)
    except OptionError:
        raise bad(key, value, allowed) from None
    if beta1 == 1.0 or beta2 == 0.0:
        raise bad(key, value, allowed)
    return beta1, beta2


def optional_beta2(key: str, value: object) -> float | None:
    if value is None:
        return None
    found = number(key, value, 0.0, 1.0, "null or a number in (0, 1)")
    if found in (0.0, 1.0):
        raise bad(key, value, "null or a number in (0, 1)")
    return found


def optional_factor_beta(key: str, value: object) -> float | None:
    allowed = "null or a number in (0, 1] (1: an AdaGrad sum)"
    found = None if value is None else number(key, value, 0.0, 1.0, allowed)
    if found == 0.0:
        raise bad(key, value, allowed)
    return found


def growth(key: str, value: object) -> float:
    """0 or a number in [0.01, 1]; smaller ones would refresh at every step for hundreds of steps."""
    allowed = "0, or a number in [0.01, 1]"
    found = number(key, value, 0.0, 1.0, allowed)
    if 0.0 < found < 0.01:
        raise bad(key, value, allowed)
    return found


def flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise bad(key, value, "true or false")
    return value


def optional_root(key: str, value: object) -> float | tuple[float | None, ...] | None:
    allowed = (
        "null or a number p from 0.001 to 1000, the root in A^(-1/p), or a list of these for 1, 2, ... preconditioned "
        "dims"
    )
    if isinstance(value, (tuple, list)) and value:
        try:
            return tuple(None if p is None else number(key, p, 1e-3, 1e3, allowed) for p in value)
        except OptionError:
            raise bad(key, value, allowed) from None
    return None if value is None else number(key, value, 1e-3, 1e3, allowed)


def small_int(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise bad(key, value, "0, or 1 if the first dim counts separate matrices")
    return value


def lengths(key: str, value: object) -> tuple[int, ...]:
    if isinstance(value, (tuple, list)) and len(value) != 1 and all(type(n) is int and n >= 1 for n in value):
        return tuple(value)
    raise bad(key, value, "a list of lengths >= 1 such as [4096, 1024, 1024], or [] for no split")


def one_of(*allowed: str) -> Check:
    """One of these, in lower or upper case."""

    def check(key: str, value: object) -> str:
        if not isinstance(value, str) or value.lower() not in allowed:
            raise bad(key, value, f"one of {', '.join(allowed)}")
        return value.lower()

    return check


def exactly(*allowed: str) -> Check:
    """One of these, spelled exactly so."""

    def check(key: str, value: object) -> str:
        if value not in allowed:
            raise bad(key, value, f"one of {', '.join(allowed)}")
        return str(value)

    return check


def nullable(inner: Check) -> Check:
    """What ``inner`` allows, or None."""

    def check(key: str, value: object) -> Any:
        if value is None:
            return None
        try:
            return inner(key, value)
        except OptionError as error:
            raise bad(key, value, f"null or {error.allowed}") from None

    return check


def dtype_name(*allowed: str) -> Check:
    """One of these dtype names; the torch dtype itself is accepted too."""

    def check(key: str, value: object) -> str:
        name = str(value).removeprefix("torch.")
        if name not in allowed:
            raise bad(key, value, f"one of {', '.join(allowed)}")
        return name

    return check


def patterns_with(kinds: Sequence[str]) -> Check:
    """A list of name patterns, and of ``kind:`` with one of these kinds."""

    def check(key: str, value: object) -> tuple[str, ...]:
        if isinstance(value, str) or not isinstance(value, (tuple, list)) or not all(isinstance(v, str) for v in value):
            raise bad(key, value, 'a list of name patterns such as "*embed*" or kinds such as "kind:embedding"')
        strange = [v for v in value if v.startswith("kind:") and v.removeprefix("kind:") not in kinds]
        if strange:
            raise bad(key, value, f"{strange[0]!r} is not a kind; kinds are {', '.join(kinds)}")
        return tuple(value)

    return check
