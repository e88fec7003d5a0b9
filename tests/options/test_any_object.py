"""Any Python object as the value of any option: it is taken, or refused with an OptionError; nothing of it runs on."""

from __future__ import annotations

import datetime
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from shampoo_deepspeed import OptionError
from shampoo_deepspeed.options.config import GIVEN_NAMES, ShampooConfig
from shampoo_deepspeed.options.names import ALIASES, IGNORED, ONLY_FALSE


class Obstinate:
    """An object that can be neither compared, nor printed, nor taken for true or false."""

    def __eq__(self, other: object) -> bool:
        raise KeyError("eq")

    def __bool__(self) -> bool:
        raise KeyError("bool")

    def __repr__(self) -> str:
        raise KeyError("repr")

    def __hash__(self) -> int:
        return 1


VALUES: list[Any] = [
    *(2**63, -(2**63) - 1, 2**64, 10**400, -(10**5000), 1e308, 5e-324, float("nan"), float("-inf"), -0.0, True, None),
    *("", "\udcff", "a\0b", "x" * 10**6, "1e-3", "true", "auto", b"x", 1 + 2j, object(), Obstinate(), print, int, type),
    *([], (), {}, set(), [[]], [None], [float("nan")], (1, 2, 3), (0.9, "x"), {"a": 1}, {1: 2}, [Obstinate()]),
    *({"x": {"lr": float("nan")}}, [{"match": "*", "lr": 2**63}], OrderedDict(a=Obstinate()), [1] * 10**5, range(3)),
    *(torch.tensor(float("nan")), torch.tensor([1.0, 2.0]), torch.tensor(1j), torch.empty(0), torch.tensor(2**62)),
    *(np.float64("nan"), np.array([1, 2]), np.array("x"), np.datetime64("2020"), np.int64(-1), torch.device("cpu")),
    *(Decimal("sNaN"), Decimal("1e999999"), Fraction(10**500, 1), datetime.timedelta(1), torch.float64),
]


@pytest.mark.parametrize("key", sorted({*GIVEN_NAMES, *ALIASES, *IGNORED, *ONLY_FALSE}))
def test_any_value_is_taken_or_refused_by_name(key: str) -> None:
    refused = 0
    for value in VALUES:
        try:
            ShampooConfig.from_options({key: value})
        except OptionError as error:
            refused += 1
            assert "option" in str(error) and len(str(error)) < 4000
    assert refused or key in IGNORED
