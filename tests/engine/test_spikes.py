"""Gradients as training gives them are practically never rejected as spikes: heavy tails, trends, other batch sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from shampoo_deepspeed.engine.agreement import SPIKES, is_spike

RUNS, EARLY, STEPS = 4_000, 20, 80
# By step, counted from 0: the factor on the norms of all gradients, as training of language models shows it.
TRENDS: dict[str, Callable[[int], float]] = {
    "none": lambda _: 1.0,
    "falls_tenfold": lambda step: 10.0 ** (-min(step, 20) / 20),
    "grows_tenfold": lambda step: 10.0 ** (min(step, 20) / 20),
    "grows_tenfold_at_once": lambda step: 10.0 ** (min(step, 3) / 3),
    "smaller_batch": lambda step: 8.0 if step >= 50 else 1.0,
    "larger_batch": lambda step: 0.125 if step >= 50 else 1.0,
    "warm_up": lambda step: 3.0 if step >= 2 else 1.0,
}
# Of lognormal norms by sigma: how many of a thousand runs may lose a step early, and how many of a million steps later.
MOST = {0.5: (1.0, 20.0), 0.75: (1.0, 200.0), 1.0: (5.0, 1000.0)}


def rejections(sigma: float, trend: Callable[[int], float], beta: float) -> tuple[float, float, int]:
    """Return the share of runs with a step rejected early, that of steps rejected later, and the most in a row."""
    generator = torch.Generator().manual_seed(0)
    total, row = torch.zeros(RUNS, dtype=torch.float64), torch.zeros(RUNS, dtype=torch.long)
    seen = torch.zeros(RUNS, dtype=torch.long)
    early, later, most = torch.zeros(RUNS, dtype=torch.bool), 0, 0
    for step in range(STEPS):
        norms = trend(step) * (sigma * torch.randn(RUNS, generator=generator, dtype=torch.float64)).exp()
        now, spike = norms.square(), torch.zeros(RUNS, dtype=torch.bool)
        for count in seen.unique().tolist():
            before = total / (1.0 - beta**count) if count else torch.zeros_like(total)
            spike |= (seen == count) & (row < SPIKES) & is_spike(now, before, count)
        early |= spike & (step < EARLY)
        later += int(spike.sum()) if step >= EARLY else 0
        row = torch.where(spike, row + 1, 0)
        total = torch.where(spike, total, beta * total + (1.0 - beta) * now)
        seen, most = seen + ~spike, max(most, int(row.max()))
    return early.double().mean().item(), later / (RUNS * (STEPS - EARLY)), most


@pytest.mark.parametrize("beta", [0.95, 0.999])
@pytest.mark.parametrize("sigma", MOST)
@pytest.mark.parametrize("trend", TRENDS)
def test_usual_gradients_are_practically_never_spikes(trend: str, sigma: float, beta: float) -> None:
    early, later, in_a_row = rejections(sigma, TRENDS[trend], beta)
    assert (1e3 * early, 1e6 * later) <= MOST[sigma] and 1e6 * later <= MOST[sigma][1]
    assert in_a_row < SPIKES


@pytest.mark.parametrize(("seen", "least"), [(1, 288.0), (8, 64.0), (1000, 33.0)])
def test_what_is_far_above_the_running_mean_is_a_spike(seen: int, least: float) -> None:
    before = torch.tensor(4.0, dtype=torch.float64)
    for factor, wanted in ((0.9 * least, False), (1.1 * least, True), (float("nan"), True)):
        assert bool(is_spike(before * factor**2, before, seen)) == wanted
