"""Checks that a run is the same on all ranks, and within its bound of the unsharded reference."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.support.launch import Ask, Check
from tests.support.scenarios import BOUND, Scenario, expected
from tests.support.zoo import relative_error


def deviations(values: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, float]:
    assert values.keys() == wanted.keys()
    return {name: relative_error(values[name], wanted[name]) for name in wanted}


def assert_ranks_agree(values: list[dict[str, Tensor]]) -> None:
    for other in values[1:]:
        assert all(torch.equal(values[0][n], other[n]) for n in values[0]), "ranks hold different parameters"


def assert_exact(values: Mapping[str, Tensor], scenario: Scenario, bound: float | None = None) -> None:
    found = deviations(values, expected(scenario))
    worst = max(found, key=lambda n: found[n] if found[n] == found[n] else float("inf"))
    print(f"{scenario.settings}: {worst} deviates by {found[worst]:.1e}")  # shown by pytest -rP
    assert found[worst] <= (bound or BOUND[scenario.settings]), f"{worst} deviates by {found[worst]:.2e}; all: {found}"


def assert_on_trajectory(check: Check, ask: Ask, bound: float | None = None) -> None:
    """Check that all ranks end with the same parameters, and that these are the reference's, up to a bound."""
    values = ask(check)
    assert_ranks_agree(values)
    assert_exact(values[0], check.argument, bound)
