"""Numbers of any library are options, in groups and when a schedule sets them; wrong ones are refused at that step."""

from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.options.config import OPTION_NAMES
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot

REALS: dict[str, Callable[[float], Any]] = {
    "np.float16": np.float16,
    "np.float32": np.float32,
    "np.float64": np.float64,
    "np.longdouble": np.longdouble,
    "array": np.array,
    "Fraction": Fraction,
    "Decimal": Decimal,
    "tensor": torch.tensor,
    "tensor_of_one": lambda x: torch.tensor([x], dtype=torch.float64),
    "parameter": lambda x: torch.nn.Parameter(torch.tensor(x)),
}
INTEGERS: dict[str, Callable[[int], Any]] = {
    "np.int32": np.int32,
    "np.uint8": np.uint8,
    "array": np.array,
    "tensor": torch.tensor,
}
HALVES = [name for name in OPTION_NAMES if isinstance(ShampooConfig.__dataclass_fields__[name].default, float)]
HALVES += ["beta3", "peak_lr", "factor_beta", "refresh_growth", "refresh_tolerance", "grafting_beta2", "embedding_lr"]
HALVES += ["tied_embedding_lr"]
HALVES += ["exponent_override", "bucket_mb"]
WHOLE = ["max_preconditioner_dim", "batch_dims", "statistics_frequency", "precondition_frequency", "failure_limit"]
WHOLE += ["start_preconditioning_step"]
PAIRS = ["betas", "elementwise_betas", "exponent_override"]


def built(name: str, value: object) -> ShampooConfig:
    """Options with this value, and what it needs."""
    needed: dict[str, Any] = {"dampening": {"momentum": 0.5}}
    needed |= dict.fromkeys(("exponent_override", "refresh_tolerance"), {"preconditioner": "shampoo"})
    return ShampooConfig.from_options({**needed.get(name, {}), name: value})


def is_plain(value: object) -> bool:
    """Whether a value holds Python's own numbers only."""
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str, dict)


@pytest.mark.parametrize("kind", list(REALS))
def test_real_numbers_of_all_kinds_are_the_same_as_pythons(kind: str) -> None:
    for name in sorted(set(HALVES)):
        found = getattr(built(name, REALS[kind](0.5)), name)
        assert float(found) == 0.5, name
        assert type(found) is float or (name == "lr" and isinstance(found, torch.Tensor)), name
    for name in PAIRS:
        for pair in ([REALS[kind](0.5)] * 2, (REALS[kind](0.5), 0.5)):
            found = getattr(built(name, pair), name)
            assert found == (0.5, 0.5) and is_plain(found), name


@pytest.mark.parametrize("kind", list(INTEGERS))
def test_integers_of_all_kinds_are_the_same_as_pythons(kind: str) -> None:
    for name in WHOLE:
        assert type(getattr(built(name, INTEGERS[kind](1)), name)) is int, name
    assert ShampooConfig(split=tuple(INTEGERS[kind](n) for n in (4, 2))).split == (4, 2)
    for name in HALVES:
        if name in ("lr", "eps", "weight_decay", "elementwise_lr", "bucket_mb"):
            found = getattr(built(name, INTEGERS[kind](1)), name)
            assert float(found) == 1.0, name


@pytest.mark.parametrize("pair", [np.array([0.5, 0.75]), torch.tensor([0.5, 0.75])], ids=["array", "tensor"])
def test_a_pair_may_be_an_array(pair: Any) -> None:
    assert ShampooConfig(betas=pair).betas == (0.5, 0.75)


HUGE = 10**400
STRANGE = [True, np.bool_(True), torch.tensor(True), 1j, np.complex64(1), torch.tensor(1j), np.ones(2), torch.ones(2)]
STRANGE += [np.array("0.5"), b"0.5", np.float32("nan"), Decimal("NaN"), Decimal("sNaN"), -Fraction(1, 2), HUGE]
STRANGE += [-HUGE, torch.tensor(-math.inf), np.ones(0), "auto", None, [], object()]


@pytest.mark.parametrize("value", STRANGE, ids=range(len(STRANGE)))
def test_what_is_no_such_number_is_refused(value: Any) -> None:
    for name in ("lr", "eps", "weight_decay", "momentum"):
        with pytest.raises(OptionError, match=f"{name!r} = "):
            ShampooConfig.from_options({name: value})
    for name in ("failure_limit", "precondition_frequency"):
        if value is not HUGE:
            with pytest.raises(OptionError, match=f"{name!r} = "):
                ShampooConfig.from_options({name: value})


@pytest.mark.parametrize("kind", [name for name in REALS if "tensor" not in name and name != "parameter"])
def test_a_schedule_may_compute_with_any_library(kind: str) -> None:
    """Groups and their copies hold Python's numbers, before the next step too: torch.load takes no others."""
    make = REALS[kind]
    scheduled, by_hand = parameter(12, 10), parameter(12, 10)
    optimizer = Shampoo([{"params": [scheduled], "weight_decay": make(0.25)}], lr=make(0.5))
    other = Shampoo([by_hand], lr=0.5, weight_decay=0.25)
    for step in range(3):
        rate = 2.0 ** -(step + 4)
        optimizer.param_groups[0].update(lr=make(rate), betas=[make(0.5), make(0.75)], eps=make(rate))
        other.param_groups[0].update(lr=rate, betas=(0.5, 0.75), eps=rate)
        saved = optimizer.state_dict()
        assert all(is_plain(value) for key, value in saved["param_groups"][0].items() if key != "params")
        torch.save(saved, file := io.BytesIO())
        file.seek(0)
        torch.load(file, weights_only=True)
        drive(optimizer, [scheduled], [step])
        drive(other, [by_hand], [step])
    assert torch.equal(scheduled, by_hand)
    group = {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}
    assert json.loads(json.dumps(group))["lr"] == rate
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


FAULTY: list[tuple[str, Any]] = [
    ("lr", math.nan), ("lr", -1.0), ("lr", math.inf), ("lr", "0.1"), ("lr", None), ("lr", True), ("lr", 1j),
    ("lr", torch.ones(2)), ("lr", np.ones(2)), ("lr", torch.tensor(math.nan)), ("lr", torch.tensor([-1.0])),
    ("lr", np.float32("inf")), ("weight_decay", math.nan), ("weight_decay", -0.1), ("weight_decay", torch.ones(2)),
    ("weight_decay", None), ("betas", (0.9, math.nan)), ("betas", (0.9, torch.ones(2))), ("betas", np.ones(3)),
    ("betas", "0.9"), ("betas", None), ("eps", math.inf), ("eps", -1e-8), ("momentum", False), ("momentum", 1.0),
    ("factor_beta", math.nan), ("failure_limit", 0), ("peak_lr", -1.0),
]  # fmt: skip


def test_a_faulty_value_set_during_the_run_is_refused_at_that_step_and_nothing_changes() -> None:
    """The message names group and key; what else was changed before counts from the next good step on."""
    params, twins = [parameter(12, 10), parameter(5)], [parameter(12, 10), parameter(5)]

    def of_two(given: list[torch.nn.Parameter]) -> Shampoo:
        return shampoo([{"params": given[:1]}, {"params": given[1:], "name": "vectors"}])

    optimizer, twin = of_two(params), of_two(twins)
    drive(optimizer, params, range(3))
    drive(twin, twins, range(3))
    for key, value in FAULTY:
        group = optimizer.param_groups[1]
        good, before = group[key], [*snapshot(params), *snapshot(params)]
        saved = copy.deepcopy(optimizer.state_dict()["shampoo"])
        group[key] = value
        with pytest.raises(OptionError, match=f"in parameter group 1 \\('vectors'\\).*{key!r} = "):
            drive(optimizer, params, [99])
        assert same_bits([*snapshot(params), *snapshot(params)], before)
        again = optimizer.state_dict()["shampoo"]
        assert str(again) == str(saved), key
        group[key] = good
    drive(optimizer, params, range(3, 6))
    drive(twin, twins, range(3, 6))
    assert same_bits(params, twins)


def test_a_faulty_value_before_the_first_step_is_refused_too() -> None:
    optimizer = shampoo([p := parameter(4, 3)])
    optimizer.param_groups[0]["lr"] = math.nan
    with pytest.raises(OptionError, match="in parameter group 0: .*'lr' = nan"):
        drive(optimizer, [p], [0])
    assert not optimizer.units


def test_a_refused_group_leaves_the_good_changes_of_others_to_the_next_step() -> None:
    params = [parameter(4, 3), parameter(4, 3)]
    optimizer = shampoo([{"params": [p]} for p in params])
    drive(optimizer, params, range(2))
    optimizer.param_groups[0]["weight_decay"] = 0.5
    optimizer.param_groups[1]["weight_decay"] = -1.0
    with pytest.raises(OptionError, match="in parameter group 1"):
        drive(optimizer, params, [2])
    optimizer.param_groups[1]["weight_decay"] = 0.0
    assert [optimizer.configs()[number].weight_decay for number in (0, 1)] == [0.5, 0.0]


class OnADevice(torch.Tensor):
    """A learning rate that says that it lies on an accelerator, where reading it would wait."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def item(self) -> Any:
        raise AssertionError("read")

    __float__ = __bool__ = tolist = item


def test_a_rate_on_a_device_is_not_read_by_the_check() -> None:
    optimizer = shampoo([p := parameter(4, 3)])
    drive(optimizer, [p], range(2))
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01).as_subclass(OnADevice)
    optimizer.configs()
    assert optimizer.param_groups[0]["lr"].shape == ()
    optimizer.param_groups[0]["lr"] = torch.ones(2, device="meta")
    with pytest.raises(OptionError, match="one such element"):
        optimizer.configs()
