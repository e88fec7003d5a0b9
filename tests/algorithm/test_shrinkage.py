"""Shrinkage by the number of gradients: that number, what a refresh makes of it, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm.preconditioners import build
from shampoo_deepspeed.algorithm.preconditioners.shampoo import Counted, Sampling
from tests.support.stepping import refresh

F64 = torch.float64
WIDE: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64"}


def refreshed(gradients: list[Tensor], step: int, **options: Any) -> dict[str, Tensor]:
    """Return the state of one block after these gradients and a refresh at a step."""
    preconditioner = build(ShampooConfig.from_options({"early_relative_epsilon": 0.0, **WIDE, **options}))
    state = preconditioner.new_state(1, tuple(gradients[0].shape), torch.device("cpu"), F64)
    for n, g in enumerate(gradients, start=1):
        preconditioner.accumulate(state, g[None].to(F64), n, None)
    factors = {name: tensor.clone() for name, tensor in state.items() if name.startswith("factor")}
    assert refresh(preconditioner, state, step, torch.zeros(1, *gradients[0].shape, dtype=F64)) == []
    assert all(torch.equal(state[name], factor) for name, factor in factors.items())
    return state


def test_gradients_count_by_their_weights() -> None:
    """With decay 1/2: weights 1; 1 and 1/2; 1, 1/2 and 1/4; at last 2^2 / (4 / 3) = 3."""
    found = [Counted(seen, 0, 1).effective(0.5) for seen in (1, 2, 3, 200)]
    assert found == pytest.approx([1.0, 2.25 / 1.25, 1.75**2 / 1.3125, 3.0], rel=1e-14)
    assert [Counted(seen, 0, 1).effective(1.0) for seen in (1, 2, 7)] == [1.0, 2.0, 7.0]


def test_sampled_gradients_count_once_with_the_weight_of_their_window() -> None:
    """Decay 1/2, one gradient, then two that stand for two each: weights (1 - 1/4) (1, 1/4) and (1 - 1/2) 1/16."""
    weights = [3 / 4, 3 / 16, 1 / 32]
    direct = sum(weights) ** 2 / sum(w * w for w in weights)
    assert Counted(1, 2, 2).effective(0.5) == pytest.approx(direct, rel=1e-14)
    assert Counted(1, 2, 3).effective(1.0) == 49 / 19


def test_modes_take_turns_once_gradients_are_sampled() -> None:
    """All up to step 3; then one in two, from step 4 on for the first mode and from step 5 on for the second."""
    sampling = Sampling(dense=3, frequency=2)
    turns = [[sampling.stands_for(step, place, 2) for step in range(1, 9)] for place in range(2)]
    assert turns == [[1, 1, 1, 2, 0, 2, 0, 2], [1, 1, 1, 0, 2, 0, 2, 0]]
    for place in range(2):
        for step in range(1, 9):
            counted = sampling.counted(step, place, 2)
            used = [n for n in turns[place][:step] if n]
            assert (counted.single, counted.sampled) == (used.count(1), used.count(2))
            assert counted.gradients == sum(used)
    assert [sampling.stands_for(step, 0, 1) for step in range(1, 7)] == [1, 1, 1, 2, 0, 2]


def test_a_slow_decay_loses_no_digits() -> None:
    for decay in (1.0 - 1e-9, 0.999999, 0.999):
        weights = [decay**age for age in range(50)]
        direct = sum(weights) ** 2 / sum(w * w for w in weights)
        assert Counted(50, 0, 1).effective(decay) == pytest.approx(direct, rel=1e-6)


def test_a_refresh_takes_roots_of_shrunk_factors() -> None:
    """G = diag(3, 1) has the factors diag(9, 1), with mean 5; half of it gives diag(7, 3)."""
    options: dict[str, Any] = {"preconditioner": "shampoo", "shrinkage": 0.5, "exponent_override": 1.0}
    options |= {"epsilon": 0.0, "relative_epsilon": 0.0}
    for extra in ({}, {"refresh_tolerance": 0.1}, {"solver": "coupled_newton"}):
        state = refreshed([torch.diag(torch.tensor([3.0, 1.0]))], 1, **options, **extra)
        for mode in (0, 1):
            torch.testing.assert_close(state[f"root_{mode}"][0], torch.diag(torch.tensor([1 / 7, 1 / 3], dtype=F64)))


def test_a_diagonal_shrinks_towards_its_mean() -> None:
    """Rows (2, 0, 0) and (0, 0, 0): the diagonal (4, 0, 0) has the mean 4/3, the other factor is diag(4, 0)."""
    g = torch.zeros(2, 3)
    g[0, 0] = 2.0
    options: dict[str, Any] = {"large_dim": "diagonal", "max_preconditioner_dim": 2, "exponent_override": 1.0}
    options["preconditioner"] = "shampoo"
    state = refreshed([g], 1, shrinkage=0.75, epsilon=0.0, relative_epsilon=0.0, **options)
    torch.testing.assert_close(state["root_1"][0], torch.tensor([0.5, 1.0, 1.0], dtype=F64))
    torch.testing.assert_close(state["root_0"][0], torch.diag(torch.tensor([1 / 2.5, 1 / 1.5], dtype=F64)))


def test_shrunk_to_the_identity_the_preconditioner_does_nothing_but_scale() -> None:
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    for name in ("shampoo", "kl_shampoo"):
        state = refreshed([g], 1, preconditioner=name, shrinkage=1.0, epsilon=0.0, relative_epsilon=0.0)
        mean = g.square().sum() / torch.tensor([4.0, 3.0], dtype=F64)
        # KL-Shampoo keeps roots of factors with mean eigenvalue 1, and their common scale.
        for mode in (0, 1):
            wanted = torch.eye(len(state[f"root_{mode}"][0]), dtype=F64)
            wanted = wanted * mean[mode] ** -0.25 if name == "shampoo" else wanted
            torch.testing.assert_close(state[f"root_{mode}"][0], wanted)


def test_shrinkage_does_not_change_the_scale_of_kl_shampoo() -> None:
    drawn = [torch.randn(4, 3, generator=torch.Generator().manual_seed(n)) for n in range(5)]
    scales = [refreshed(drawn, 5, preconditioner="kl_shampoo", shrinkage=s)["scale"] for s in (0.0, 0.7)]
    torch.testing.assert_close(scales[0], scales[1], rtol=1e-12, atol=0.0)
