"""Refresh schedules: every block in its phase, equal work in every step, the same on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.engine.refresh_schedule import staggered_phases

costs_of_blocks = st.lists(st.integers(1, 1000).map(float), max_size=200)
frequencies = st.integers(1, 24)


def by_phase(costs: list[float], phases: list[int], frequency: int) -> list[float]:
    return [sum(c for c, p in zip(costs, phases, strict=True) if p == phase) for phase in range(frequency)]


@given(costs_of_blocks, frequencies)
def test_phases_differ_by_one_block_at_most(costs: list[float], frequency: int) -> None:
    phases = staggered_phases(costs, frequency)
    assert all(0 <= phase < frequency for phase in phases)
    loads = by_phase(costs, phases, frequency)
    assert max(loads) - min(loads) <= max(costs, default=0.0)


@given(costs_of_blocks, costs_of_blocks, frequencies)
def test_blocks_that_join_later_leave_the_others_in_their_phase(
    first: list[float], later: list[float], frequency: int
) -> None:
    before = staggered_phases(first, frequency)
    assert staggered_phases(first + later, frequency)[: len(first)] == before
    joined = staggered_phases(later, frequency, by_phase(first, before, frequency))
    assert before + joined == staggered_phases(first + later, frequency)


def test_equal_blocks_are_spread_evenly_over_the_phases() -> None:
    assert staggered_phases([7.0] * 8, 3) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_phases_of_another_frequency_are_refused() -> None:
    with pytest.raises(ValueError, match="earlier holds 2 phases; with frequency 3"):
        staggered_phases([1.0], 3, [1.0, 2.0])


def refreshed(start: int, frequency: int, steps: range) -> list[list[int]]:
    """Return the phases that each step refreshes, with one block in each phase."""
    config = ShampooConfig(start_preconditioning_step=start, precondition_frequency=frequency, refresh_growth=0.0)
    phases = range(frequency)
    stack = BlockStack([f"p/{n}" for n in phases], (2, 2), config, torch.device("meta"), torch.float32, phases)
    return [[phase for due in stack._due(phases, step) for phase in phases[due]] for step in steps]


@given(st.integers(0, 16), frequencies, st.integers(0, 23))
def test_a_staggered_block_refreshes_first_within_the_window_and_then_once_in_each(
    wait: int, frequency: int, phase: int
) -> None:
    phase, start = phase % frequency, frequency + wait
    steps = range(1, start + 5 * frequency)
    due = [step for step, phases in zip(steps, refreshed(start, frequency, steps), strict=True) if phase in phases]
    assert due == [start + phase + n * frequency for n in range(5)]


@given(st.integers(1, 200), st.integers(0, 30), frequencies)
def test_each_step_refreshes_one_phase_and_none_before_the_start(step: int, wait: int, frequency: int) -> None:
    """Phases whose first refresh is still to come are not counted."""
    start = frequency + wait
    (due,) = refreshed(start, frequency, range(step, step + 1))
    assert due == ([] if step < start else [(step - start) % frequency])


@given(st.integers(1, 12), st.floats(0.01, 1.0), st.integers(1, 20))
def test_a_staggered_block_refreshes_once_in_each_shorter_window_at_the_start(
    frequency: int, growth: float, start: int
) -> None:
    config = ShampooConfig(start_preconditioning_step=start, precondition_frequency=frequency, refresh_growth=growth)
    phases = range(frequency)
    stack = BlockStack([f"p/{n}" for n in phases], (2, 2), config, torch.device("meta"), torch.float32, phases)
    step = start
    for _ in range(20):
        begin, length = config.refresh_window(step)
        window = [[p for due in stack._due(phases, begin + place) for p in phases[due]] for place in range(length)]
        assert begin == step and sum(window, []) == list(phases)
        assert max(map(len, window)) - min(map(len, window)) <= 1
        step += length
