"""Checks of single values: each takes an option's name and value, and returns the value to keep or raises."""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any

import torch
from torch import Tensor

Check = Callable[[str, object], Any]
LONGEST = 500  # characters of a value in an error
# Steps compute in float32. Up to these values, what a step makes of options stays within its range: a million times
# ``eps``, or a weight after many steps at the largest rate.
LARGEST, LARGEST_RATE = 1e30, 1e6
LARGEST_INT = 2**53  # as float64 it is still exact
EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")  # which YAML 1.1 reads as text


class OptionError(ValueError):
    """An option has an unknown name or a value that is not allowed; the message names key, value and what is
    allowed."""

    allowed = ""


def short(value: object, longest: int = LONGEST) -> str:
    """A value's ``repr``, cut so that an error fits on a screen."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integer of more than 4,300 digits
        return f"a value that contains an integer of more than {sys.get_int_max_str_digits():,} digits"
    except Exception:  # whatever the value's own method raises
        return f"a {type(value).__name__} that cannot be printed"
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text):,} characters)"


def bad(key: str, value: object, allowed: str) -> OptionError:
    """The error for a value that is not allowed; ``allowed`` says what is."""
    error = OptionError(f"Shampoo option {key!r} = {short(value)} is not allowed: {allowed}.")
    error.allowed = allowed
    return error


def _hinted(allowed: str, value: object) -> str:
    """What is allowed, with the reason why a text stands in place of a number, where there is a likely one."""
    if not isinstance(value, str):
        return allowed
    if value == "auto":
        return f"{allowed}; only the Hugging Face Trainer fills in 'auto'"
    if EXPONENT.fullmatch(value):
        return (
            f"{allowed}; it is text, as YAML reads an exponent after a number without a point: write {float(value)!r}"
        )
    return allowed


def real(value: object) -> float | None:
    """The Python float of a real number, None for anything else.

    Schedules and sweeps compute with numpy's numbers, tensors and fractions, which torch's optimizers take too. An
    array or tensor stands for its only element. A truth value is no number: where one is given, it is a mistake.
    """
    if not isinstance(value, (Real, Decimal)) and hasattr(value, "item"):
        try:
            value = value.item()
        except (RuntimeError, TypeError, ValueError):  # more than one element, or none that can be read
            return None
    if isinstance(value, bool) or not isinstance(value, (Real, Decimal)):
        return None
    try:
        return float(value)
    except OverflowError:
        return -math.inf if value < 0 else math.inf
    except ValueError:  # a Decimal's signalling NaN
        return math.nan


def integer(value: object) -> int | None:
    """The Python int of an integer of any library, None for anything else; numbers such as 2.0 are none."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except (RuntimeError, TypeError, ValueError):
        return None


def plain(value: object) -> Any:
    """A value with the numbers of other libraries as Python's own, so that JSON and state dicts can hold it.

    A tensor stays, as it may be live.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(plain, value)) if type(value) in (list, tuple) else value
    if value is None or isinstance(value, Tensor) or type(value) in (bool, int, float, str):
        return value
    found = integer(value)
    return next((n for n in (found, real(value)) if n is not None), value)


def _listed(value: object) -> object:
    """A list if the value is an array or a tensor of one dim, else the value itself."""
    return value.tolist() if getattr(value, "ndim", None) == 1 and hasattr(value, "tolist") else value


def number(key: str, value: object, low: float, high: float, allowed: str) -> float:
    """A number in [low, high]."""
    found = real(value)
    if found is None:
        raise bad(key, value, _hinted(allowed, value))
    if not low <= found <= high:  # NaN fails too
        raise bad(key, value, allowed)
    return found


def non_negative(key: str, value: object) -> float:
    return number(key, value, 0.0, LARGEST, f"a number >= 0, at most {LARGEST:g}")


def rate(key: str, value: object) -> float:
    return number(key, value, 0.0, LARGEST_RATE, f"a number >= 0, at most {LARGEST_RATE:g}")


def positive_rate(key: str, value: object) -> float:
    return number(key, value, 1e-300, LARGEST_RATE, f"a number > 0, at most {LARGEST_RATE:g}")


def learning_rate(key: str, value: object) -> float | Tensor:
    if isinstance(value, Tensor):
        allowed = f"a number >= 0, at most {LARGEST_RATE:g}, or a Tensor with one such element"
        if value.numel() != 1 or value.dtype == torch.bool or value.dtype.is_complex:
            raise bad(key, value, allowed)
        if value.device.type == "cpu":  # reading it on a device would wait
            number(key, value, 0.0, LARGEST_RATE, allowed)
        return value
    return rate(key, value)


def positive_int(key: str, value: object) -> int:
    found = integer(value)
    if found is None or not 1 <= found <= LARGEST_INT:
        raise bad(key, value, "an integer >= 1, at most 2**53")
    return found


def start_step(key: str, value: object) -> int:
    found = integer(value)
    if found is None or not (found == -1 or 1 <= found <= LARGEST_INT):
        raise bad(
            key, value, "an integer >= 1, or -1 (precondition_frequency, or 2 with refresh_growth), at most 2**53"
        )
    return found


def fraction(key: str, value: object) -> float:
    found = number(key, value, 0.0, 1.0, "a number in [0, 1)")
    if found == 1.0:
        raise bad(key, value, "a number in [0, 1)")
    return found


def beta_pair(key: str, value: object) -> tuple[float, float]:
    allowed = "two numbers [beta1, beta2] with 0 <= beta1 < 1 and 0 < beta2 <= 1 (1: an AdaGrad sum)"
    pair = _listed(value)
    if isinstance(pair, (tuple, list)) and len(pair) == 3:
        raise bad(key, value, f"{allowed}; three are of another optimizer, as Adan, AdEMAMix or Adafactor: keep two")
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise bad(key, value, _hinted(allowed, value))
    try:
        beta1, beta2 = (number(key, v, 0.0, 1.0, allowed) for v in pair)
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
    given = _listed(value) if real(value) is None else value
    if isinstance(given, (tuple, list)) and given:
        try:
            return tuple(None if p is None else number(key, p, 1e-3, 1e3, allowed) for p in given)
        except OptionError:
            raise bad(key, value, allowed) from None
    return None if value is None else number(key, value, 1e-3, 1e3, allowed)


def small_int(key: str, value: object) -> int:
    found = integer(value)
    if found not in (0, 1):
        raise bad(key, value, "0, or 1 if the first dim counts separate matrices")
    return found


def lengths(key: str, value: object) -> tuple[int, ...]:
    given = _listed(value)
    if isinstance(given, (tuple, list)) and len(given) != 1:
        found = [n for n in map(integer, given) if n is not None and 1 <= n <= LARGEST_INT]
        if len(found) == len(given):
            return tuple(found)
    raise bad(key, value, "a list of lengths >= 1 such as [4096, 1024, 1024], or [] for no split")


def one_of(*allowed: str) -> Check:
    """One of these, in lower or upper case."""

    def check(key: str, value: object) -> str:
        if not isinstance(value, str) or value.lower() not in allowed:
            raise bad(key, value, f"one of {', '.join(allowed)}")
        return value.lower()

    return check


def key_of(table: Mapping[str, object]) -> Check:
    """A key of the table as it is then, in lower or upper case."""

    def check(key: str, value: object) -> str:
        return one_of(*table)(key, value)

    return check


def exactly(*allowed: str) -> Check:
    """One of these, spelled exactly so."""

    def check(key: str, value: object) -> str:
        if not isinstance(value, str) or value not in allowed:
            raise bad(key, value, f"one of {', '.join(allowed)}")
        return value

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
        name = str(value).removeprefix("torch.") if isinstance(value, (str, torch.dtype)) else None
        if name not in allowed:
            raise bad(key, value, f"one of {', '.join(allowed)}")
        return name

    return check


def device_name(key: str, value: object) -> str:
    """``"auto"``, ``"shard"``, or the name of a device, in lower case; the torch device itself is accepted too."""
    allowed = 'auto, shard, or a device such as "cuda" or "cuda:1"'
    if isinstance(value, str) and value.lower() in ("auto", "shard"):
        return value.lower()
    if not isinstance(value, (str, torch.device)):  # torch takes numbers too, for devices of this machine
        raise bad(key, value, allowed)
    try:
        device = torch.device(value.lower() if isinstance(value, str) else value)
    except (RuntimeError, TypeError, ValueError):
        raise bad(key, value, allowed) from None
    if device.type == "meta":
        raise bad(key, value, allowed)
    return str(device)


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
