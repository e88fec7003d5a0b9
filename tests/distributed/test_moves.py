"""A run saved under one framework and world size continues under every other as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from tests.distributed.ranks import moves as here
from tests.support.exactness import assert_ranks_agree
from tests.support.launch import Check, CheckResult, run_checks
from tests.support.moves import RANKS, Move, unbroken
from tests.support.zoo import relative_error

BOUND = {"strict": 1e-5, "default": 2e-3}
# Every second pair, so that each framework continues its own run and those of half of the others.
PAIRS = [(s, t) for i, s in enumerate(RANKS) for j, t in enumerate(RANKS) if (i + j) % 2 == 0]
RING = list(zip(RANKS, [*list(RANKS)[1:], "single"], strict=True))
FIRST, SECOND = ["first_half"], ["second_half"]
LAUNCHES = [(1, FIRST), (2, FIRST), (4, FIRST + SECOND), (2, SECOND), (1, SECOND)]
MOVES = [Move(*pair, "strict", "") for pair in PAIRS] + [Move(*pair, "default", "") for pair in RING]

Parameters = Callable[[Move], list[dict[str, Tensor]]]


@pytest.fixture(scope="module")
def parameters(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Parameters:
    """Return the final parameters of each selected move on all ranks.

    All first halves run before any second half. So the four ranks do both in one launch, between two launches of two
    ranks.
    """
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    moves = [spec.params["move"] for spec in selected if spec is not None and "move" in spec.params]
    folder = tmp_path_factory.mktemp("moves")
    found: dict[str, CheckResult] = {}
    for settings in BOUND:
        (folder / settings).mkdir()
    placed = [replace(move, folder=str(folder / move.settings)) for move in moves]
    starts = {(m.source, m.settings): replace(m, target=m.source) for m in placed}
    halves = dict(zip(FIRST + SECOND, (list(starts.values()), placed), strict=True))
    for ranks, halves_now in LAUNCHES:
        own = {f"{half} {m.name}": (half, m) for half in halves_now for m in halves[half] if RANKS[m.target] == ranks}
        if ranks == 1:
            found |= {name: CheckResult([getattr(here, half)(move)]) for name, (half, move) in own.items()}
        else:
            checks = [Check(name, ranks, f"moves:{half}", move) for name, (half, move) in own.items()]
            found |= run_checks(checks, folder / f"{halves_now[0]}{ranks}")
        failures = [f"{name}: {result.failure}" for name, result in found.items() if result.failure]
        assert halves_now != FIRST or not failures, "\n".join(failures)

    def get(move: Move) -> list[dict[str, Tensor]]:
        result = found[f"second_half {move.name}"]
        if result.failure is not None:
            pytest.fail(result.failure, pytrace=False)
        return result.values

    return get


@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.name)
def test_the_trajectory_is_the_unbroken_one(move: Move, parameters: Parameters) -> None:
    values, wanted = parameters(move), unbroken(move.settings)
    assert_ranks_agree(values)
    errors = {name: relative_error(values[0][name], value) for name, value in wanted.items()}
    worst = max(errors, key=lambda name: errors[name])
    print(f"{worst} deviates by {errors[worst]:.1e}")  # shown by pytest -rP
    assert errors[worst] <= BOUND[move.settings], errors
