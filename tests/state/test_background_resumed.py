"""Runs with background refreshes can be resumed after any step, to the bit, in any mode, with any pending refreshes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from tests.support.backgrounds import FORMS, FREQUENCY, background, pending, some_parameters, trained
from tests.support.stepping import drive, same_bits, shampoo, snapshot, state_of, through_a_file


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("way", ["state_dict", "save_shampoo", "asynchronous", "deepcopy", "pickle"])
def test_a_run_resumed_after_any_step_goes_on_bit_for_bit(way: str, name: str, tmp_path: Path) -> None:
    """Pending refreshes are installed by the next step, as in the uninterrupted run."""
    options = FORMS[name]
    params = some_parameters()
    optimizer = background(params, **options)
    states, copies = [], {}
    for step in range(12):
        states.append((snapshot(params), state_of(optimizer)))
        if FREQUENCY <= step <= 2 * FREQUENCY + 1 and (step % 3 == 0 or (way, name) == ("state_dict", "soap")):
            copies[step] = another(way, optimizer, params, options, tmp_path / str(step))
            assert len(pending(optimizer)) >= 3
        drive(optimizer, params, [step])
    for step, (copied, other) in copies.items():
        for later in range(step, 12):
            values, state = states[later]
            assert same_bits(snapshot(copied), values), (step, later)
            if later > step:  # before the first step, the loaded state is still pending
                assert same_bits(state_of(other), state), (step, later)
            drive(other, copied, [later])
        assert same_bits(snapshot(copied), snapshot(params))


def another(
    way: str, optimizer: Shampoo, params: list[nn.Parameter], options: dict[str, Any], folder: Path
) -> tuple[list[nn.Parameter], Shampoo]:
    """Return the parameters and optimizer of another process that continues."""
    if way in ("deepcopy", "pickle"):
        copied, other = (
            copy.deepcopy((params, optimizer)) if way == "deepcopy" else pickle.loads(pickle.dumps((params, optimizer)))
        )
        return copied, other
    copied = [nn.Parameter(p) for p in snapshot(params)]
    other = background(copied, **options)
    if way == "state_dict":
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        save_shampoo(optimizer, folder, asynchronous=way == "asynchronous").result()
        load_shampoo(other, folder)
    return copied, other


def test_blocks_pending_under_other_owners_or_resaved_stay_pending(tmp_path: Path) -> None:
    """A loaded state whose units are not built yet is saved again as it is."""
    params, optimizer = trained(FREQUENCY + 1)
    wanted = pending(optimizer)
    save_shampoo(optimizer, tmp_path / "first")
    copied = [nn.Parameter(p) for p in snapshot(params)]
    other = background(copied)
    load_shampoo(other, tmp_path / "first")
    assert pending(other) == wanted
    save_shampoo(other, tmp_path / "second")
    again = background(copied)
    again.load_state_dict(through_a_file(other.state_dict()))
    assert pending(again) == wanted
    load_shampoo(again, tmp_path / "second")
    for which, group in ((optimizer, params), (again, copied)):
        drive(which, group, range(FREQUENCY + 1, 11))
    assert same_bits(snapshot(params), snapshot(copied))


def test_a_state_without_pending_parts_is_taken_over() -> None:
    """Such states come from other modes, and from versions without this mode."""
    params = some_parameters()
    optimizer = shampoo(params, refresh="staggered", precondition_frequency=FREQUENCY)
    drive(optimizer, params, range(6))
    saved = through_a_file(optimizer.state_dict())
    for stack in saved["shampoo"]["stacks"]:
        assert stack.pop("pending") == [False] * len(stack["keys"])
    for group in saved["param_groups"]:
        group["refresh"] = "background"
    other = background(params)
    other.load_state_dict(saved)
    drive(other, params, range(6, 12))
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize("mode", ["sync", "staggered"])
def test_another_mode_installs_what_is_pending(mode: str) -> None:
    params, optimizer = trained(FREQUENCY + 2)
    waiting = pending(optimizer)
    saved = through_a_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["refresh"] = mode
    other = shampoo(params, precondition_frequency=FREQUENCY, refresh=mode)
    other.load_state_dict(saved)
    drive(other, params, [FREQUENCY + 2])
    assert pending(other) == []
    stacks = other.state_dict()["shampoo"]["stacks"]
    assert set(waiting) <= {k for s in stacks for k, is_ in zip(s["keys"], s["refreshed"], strict=True) if is_}
