"""Staggered refresh: equal work in every step, each block in its phase, and state that resumes in the same phase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.engine.refresh_schedule import refresh_phases
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of, through_a_file

FREQUENCY = 4
# Windows of one length from the first on; test_staggering.py has the shorter ones.
OPTIONS: dict[str, Any] = {
    "refresh": "staggered", "precondition_frequency": FREQUENCY, "max_preconditioner_dim": 8, "refresh_growth": 0.0,
}  # fmt: skip


def some_parameters() -> list[nn.Parameter]:
    """Return 15 blocks of five shapes; with 4 steps in a window, no step has all blocks of a shape."""
    return [parameter(*shape, seed=n) for n, shape in enumerate([(16, 24), (20, 8), (8,), (12, 16), (5, 7), (8, 8)])]


def refreshed_in(optimizer: Shampoo, params: Sequence[nn.Parameter], steps: int) -> list[list[str]]:
    """Return the keys of the blocks that each of these steps refreshes."""
    log: list[list[str]] = []
    original = BlockStack._note_refresh

    def note(stack: BlockStack, rows: Sequence[int], *rest: Any) -> None:
        log[-1] += [stack.keys[row] for row in rows]
        original(stack, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockStack, "_note_refresh", note)
        for step in range(steps):
            log.append([])
            drive(optimizer, params, range(step, step + 1))
    return [sorted(keys) for keys in log]


def test_each_block_refreshes_once_in_a_window_and_every_step_does_its_share() -> None:
    params = some_parameters()
    log = refreshed_in(shampoo(params, **OPTIONS), params, 3 * FREQUENCY)
    start = FREQUENCY - 1  # in the log, which counts from 0
    assert log[:start] == [[]] * start
    window = log[start : start + FREQUENCY]
    every = sorted(key for keys in window for key in keys)
    assert len(every) == len(set(every)) == 6 + 3 + 4 + 1 + 1
    assert all(3 <= len(keys) <= 5 for keys in window)
    assert log[start + FREQUENCY : start + 2 * FREQUENCY] == window


def test_sync_refreshes_all_blocks_in_one_step() -> None:
    params = some_parameters()
    log = refreshed_in(shampoo(params, **OPTIONS | {"refresh": "sync"}), params, 2 * FREQUENCY)
    assert [len(keys) for keys in log] == [0, 0, 0, 15] * 2


@pytest.mark.parametrize("after", [2, 5, 9], ids=["before", "within", "after"])
def test_a_run_resumed_around_its_first_window_goes_on_bit_for_bit(after: int) -> None:
    """Within this window, some blocks have roots and others do not."""
    params = some_parameters()
    optimizer = shampoo(params, **OPTIONS)
    drive(optimizer, params, range(after))
    resumed = [nn.Parameter(p) for p in snapshot(params)]
    other = shampoo(resumed, **OPTIONS)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for which, group in ((optimizer, params), (other, resumed)):
        drive(which, group, range(after, 14))
    assert same_bits(snapshot(params), snapshot(resumed))
    assert same_bits(state_of(optimizer), state_of(other))


def test_a_parameter_that_joins_late_counts_its_own_steps_and_moves_nobody() -> None:
    params = some_parameters()
    alone, joined = (shampoo(group, **OPTIONS) for group in (params, [nn.Parameter(p) for p in snapshot(params)]))
    twins = [p for group in joined.param_groups for p in group["params"]]
    late = parameter(16, 16, seed=77)
    for step in range(13):
        drive(alone, params, range(step, step + 1))
        if step == 5:
            joined.add_param_group({"params": [late]})
        drive(joined, [*twins, late] if step >= 5 else twins, range(step, step + 1))
    assert same_bits(snapshot(params), snapshot(twins))
    stacks = [stack for unit in joined.units for stack in unit.stacks]
    rows = {key: ready for s in stacks for key, ready in zip(s.keys, s.refreshed, strict=True)}
    assert all(rows[f"group1.0/{block}"] for block in range(4))  # its step 8 was the last of its first window


def test_the_order_of_the_given_parameters_decides_and_nothing_else() -> None:
    given = [Parameter(f"p{n}", (16, 24 - 8 * (n % 2)), n % 2) for n in range(6)]
    config = ShampooConfig.from_options(OPTIONS)
    policies = {p.key: policy_of(p, config) for p in given}
    phases = refresh_phases(given, policies, {0: config, 1: config})
    assert phases["p0"] == (0, 1, 2, 3, 0, 1)
    assert phases["p1"] == (2, 3, 0, 1)
    other = ShampooConfig.from_options({**OPTIONS, "precondition_frequency": 2})
    assert refresh_phases(given, policies, {0: config, 1: other})["p1"] == (0, 1, 0, 1)
    sync = ShampooConfig(refresh="sync")
    assert refresh_phases(given, policies, {0: config, 1: sync}).keys() == {"p0", "p2", "p4"}


def test_frozen_parameters_get_their_phases_last() -> None:
    """Some frameworks pass them and some do not; the trajectory is the same."""
    trained, frozen = [parameter(12, 8, seed=n) for n in range(4)], parameter(16, 16)
    frozen.requires_grad_(False)
    alike = [nn.Parameter(p) for p in snapshot(trained)]
    with_ = shampoo(
        [("a", trained[0]), ("frozen", frozen), *(("bcd"[n], p) for n, p in enumerate(trained[1:]))], **OPTIONS
    )
    without = shampoo([("abcd"[n], p) for n, p in enumerate(alike)], **OPTIONS)
    drive(with_, trained, range(9))
    drive(without, alike, range(9))
    assert same_bits(snapshot(trained), snapshot(alike))


def test_schedule_options_are_fixed_while_staggered() -> None:
    params = some_parameters()
    optimizer = shampoo(params, **OPTIONS)
    drive(optimizer, params, range(1))
    for name, value in (("precondition_frequency", 2), ("refresh", "sync")):
        before = optimizer.param_groups[0][name]
        optimizer.param_groups[0][name] = value
        with pytest.raises(OptionError, match=f"{name}' = {value!r} is not allowed: it was {before!r}"):
            drive(optimizer, params, range(1, 2))
        optimizer.param_groups[0][name] = before
    drive(optimizer, params, range(1, 2))


def test_state_of_a_sync_run_is_taken_over() -> None:
    """Roots exist already; from then on each block refreshes in its phase."""
    params = some_parameters()
    optimizer = shampoo(params, **OPTIONS | {"refresh": "sync"})
    drive(optimizer, params, range(6))
    saved = through_a_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["refresh"] = "staggered"
    other = shampoo(params, **OPTIONS)
    other.load_state_dict(saved)
    log = refreshed_in(other, params, FREQUENCY)
    assert sum(map(len, log)) == 15 and all(3 <= len(keys) <= 5 for keys in log)
    assert torch.isfinite(torch.stack([p.norm() for p in params])).all()
