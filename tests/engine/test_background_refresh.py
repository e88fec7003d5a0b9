"""Background refreshes do not depend on timing, are due as in the staggered mode, and raise errors in later steps."""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from typing import Any

import pytest
import torch

from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.preconditioners.shampoo import KLShampooPreconditioner
from tests.support.backgrounds import (
    FORMS,
    FREQUENCY,
    Compute,
    background,
    finish,
    pending,
    some_parameters,
    trained,
    wrap_compute,
)
from tests.support.stepping import drive, made_up, parameter, same_bits, snapshot, state_of

MAIN = threading.current_thread()


@pytest.mark.parametrize("name", list(FORMS))
def test_a_slow_thread_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may finish long before its results are due, only in the next step, or at any time in between."""
    quick_params = some_parameters()
    quick = background(quick_params, **FORMS[name])
    for step in range(14):
        drive(quick, quick_params, [step])
        time.sleep(0.002)
    choice = random.Random(5)

    def slowed(compute: Compute) -> Compute:
        def work(*arguments: Any) -> RefreshResult:
            time.sleep(choice.choice([0.0, 0.003]))
            found = compute(*arguments)
            time.sleep(choice.choice([0.0, 0.003]))
            return found

        return work

    wrap_compute(monkeypatch, slowed)
    params, optimizer = trained(14, **FORMS[name])
    assert same_bits(snapshot(params), snapshot(quick_params))
    assert same_bits(state_of(optimizer), state_of(quick))


def test_the_step_does_not_wait_and_the_next_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """All refreshes are on one thread, which is not the training loop's."""
    allowed, threads = threading.Event(), []

    def held(compute: Compute) -> Compute:
        def work(*arguments: Any) -> RefreshResult:
            threads.append(threading.current_thread())
            assert allowed.wait(60)
            return compute(*arguments)

        return work

    wrap_compute(monkeypatch, held)
    params = some_parameters()
    optimizer = background(params, refresh_growth=0.0)
    drive(optimizer, params, range(FREQUENCY))  # returns, although the last step's refreshes are blocked
    assert pending(optimizer) and not allowed.is_set()
    before = snapshot(params)
    later = threading.Timer(0.2, allowed.set)
    later.start()
    drive(optimizer, params, [FREQUENCY])
    assert allowed.is_set()
    assert not same_bits(snapshot(params), before)
    drive(optimizer, params, range(FREQUENCY + 1, 12))
    assert len(set(threads)) == 1 and threads[0] is not MAIN
    later.join()


def test_what_is_due_is_what_is_due_when_staggered_and_it_counts_one_step_later() -> None:
    params, optimizer = trained(FREQUENCY - 1, refresh_growth=0.0)
    assert pending(optimizer) == []
    keys: list[str] = []
    for step in range(FREQUENCY - 1, 2 * FREQUENCY - 1):
        drive(optimizer, params, [step])
        stacks = optimizer.state_dict()["shampoo"]["stacks"]
        ready = {k for s in stacks for k, is_ in zip(s["keys"], s["refreshed"], strict=True) if is_}
        assert ready == set(keys)
        assert 3 <= len(pending(optimizer)) <= 5
        keys += pending(optimizer)
    assert len(keys) == len(set(keys)) == 15


def test_rejected_steps_install_nothing_and_begin_nothing() -> None:
    """Nor does a parameter without a gradient install its pending refresh."""
    params, twins = some_parameters(), some_parameters()
    optimizer, twin = background(params), background(twins)
    for step in range(11):
        values, before = snapshot(params), state_of(optimizer)
        for _ in range(2):
            for number, p in enumerate(params):
                p.grad = made_up(p, 50 + step, number)
            gradient = params[3].grad
            assert gradient is not None
            gradient.view(-1)[2] = math.nan
            optimizer.step()
            assert same_bits(snapshot(params), values)
            assert not step or same_bits(state_of(optimizer), before)
        drive(optimizer, params, [step])
        drive(twin, twins, [step])
    assert same_bits(state_of(optimizer), state_of(twin))
    waiting = [key for key in pending(optimizer) if key.startswith("group0.0/")]
    assert waiting
    params[0].grad = None
    for number, p in enumerate(params[1:]):
        p.grad = made_up(p, 11, number)
    optimizer.step()
    assert [key for key in pending(optimizer) if key.startswith("group0.0/")] == waiting


def test_an_error_on_the_thread_is_raised_by_the_step_that_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step that needs it raises the error, and no state changes."""
    params, optimizer = trained(FREQUENCY - 1, refresh_growth=0.0)

    def broken(*_: Any) -> RefreshResult:
        raise ZeroDivisionError("on the thread")

    with monkeypatch.context() as patch:
        patch.setattr(KLShampooPreconditioner, "compute", broken)
        drive(optimizer, params, [FREQUENCY - 1])
        with pytest.raises(ZeroDivisionError):  # waits for the thread before the patch ends
            finish(optimizer)
    for _ in range(2):
        values = snapshot(params)
        with pytest.raises(ZeroDivisionError, match="on the thread"):
            drive(optimizer, params, [FREQUENCY])
        assert same_bits(snapshot(params), values)


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_failures_are_counted_and_logged_when_installed(
    preconditioner: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    p = parameter(6, 6)
    optimizer = background([("w", p)], preconditioner=preconditioner, precondition_frequency=1, refresh_growth=0.0)

    def refuse(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        with monkeypatch.context() as patch:
            patch.setattr(torch.linalg, "eigh", refuse)
            drive(optimizer, [p], [0])
            (unit,) = optimizer.units
            (refresh,) = unit.stacks[0].pending.values()
            assert refresh is not None and refresh.result().failed == {0}
        assert caplog.records == [] and unit.stacks[0].failures == [0]
        drive(optimizer, [p], [1])
    what = "eigenbasis" if preconditioner == "soap" else "inverse root"
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"no new {what} for block w/0"]
    assert (unit.stacks[0].failures, unit.stacks[0].refreshed) == ([1], [False])
    drive(optimizer, [p], [2])
    assert (unit.stacks[0].failures, unit.stacks[0].refreshed) == ([0], [True])
    assert torch.isfinite(p).all()


def test_failures_in_a_row_become_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    p = parameter(6, 6)
    optimizer = background([p], precondition_frequency=1, failure_limit=3)

    def refuse(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    drive(optimizer, [p], range(5))  # three were installed by then; reported one step later
    with pytest.raises(RuntimeError, match="failed 3 times in a row"):
        drive(optimizer, [p], range(5, 7))


def test_metrics_count_a_refresh_when_it_is_installed() -> None:
    p = parameter(8, 8)
    optimizer = background([p], precondition_frequency=3, refresh_growth=0.0)
    drive(optimizer, [p], range(3))
    before = optimizer.metrics()
    assert before["refreshed_share"] == 0.0 and "largest_condition_number" not in before
    drive(optimizer, [p], [3])
    after = optimizer.metrics()
    assert after["refreshed_share"] == 1.0 and after["refresh_ms"] > 0.0
    assert 1.0 < after["largest_condition_number"] < math.inf
