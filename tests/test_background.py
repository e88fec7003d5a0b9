"""Refreshes in the background: never a matter of timing, resumed to the bit, errors told, nothing shared touched."""

from __future__ import annotations

import copy
import logging
import math
import pickle
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_deepspeed import Shampoo, load_shampoo, roots, save_shampoo, worker
from shampoo_deepspeed.metrics import RefreshMeter
from shampoo_deepspeed.preconditioners import Preconditioner, build
from shampoo_deepspeed.preconditioners.kl_shampoo import KLShampooPreconditioner
from shampoo_deepspeed.preconditioners.renewed import Renewed
from shampoo_deepspeed.preconditioners.shampoo import ShampooPreconditioner
from shampoo_deepspeed.preconditioners.soap import SOAPPreconditioner
from tests.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of, through_a_file

FREQUENCY = 4
FORMS: dict[str, dict[str, Any]] = {
    "shampoo": {},
    "kept_bases": {"refresh_tolerance": 0.5},
    "newton": {"solver": "coupled_newton", "relative_epsilon": 1e-3},
    "newton_db": {"solver": "newton_db", "relative_epsilon": 1e-3},
    "soap": {"preconditioner": "soap"},
    "soap_tolerance": {"preconditioner": "soap", "refresh_tolerance": 0.5, "grafting": "adam"},
    "kl_shampoo": {"preconditioner": "kl_shampoo"},
    "every_step": {"precondition_frequency": 1},
    "soap_every_step": {"preconditioner": "soap", "precondition_frequency": 1},
}
MAIN = threading.current_thread()
Compute = Callable[[Preconditioner, dict[str, Tensor], int], Renewed]


def some_parameters() -> list[nn.Parameter]:
    """15 blocks of five shapes, and a vector; in each step of a window some are due."""
    return [parameter(*shape, seed=n) for n, shape in enumerate([(16, 24), (20, 8), (8,), (12, 16), (5, 7), (8, 8)])]


def background(params: list[nn.Parameter], **options: Any) -> Shampoo:
    return shampoo(params, **({"refresh": "background", "precondition_frequency": FREQUENCY} | options))


def trained(steps: int, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = some_parameters()
    optimizer = background(params, **options)
    drive(optimizer, params, range(steps))
    return params, optimizer


def pending(optimizer: Shampoo) -> list[str]:
    stacks = optimizer.state_dict()["shampoo"]["stacks"]
    return sorted(k for s in stacks for k, waits in zip(s["keys"], s["pending"], strict=True) if waits)


def finish(optimizer: Shampoo) -> None:
    """Wait for all that is under way."""
    for stack in (stack for unit in optimizer.units for stack in unit.stacks):
        for refresh in stack.pending.values():
            assert refresh is not None
            refresh.result()


def wrap_compute(patch: pytest.MonkeyPatch, wrapper: Callable[[Compute], Compute]) -> None:
    for kind in (ShampooPreconditioner, SOAPPreconditioner, KLShampooPreconditioner):
        patch.setattr(kind, "compute", wrapper(kind.compute))


@pytest.mark.parametrize("name", list(FORMS))
def test_a_slow_thread_changes_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether it is done long before its results are due, in the next step only, or at any time between."""
    quick_params = some_parameters()
    quick = background(quick_params, **FORMS[name])
    for step in range(14):
        drive(quick, quick_params, [step])
        time.sleep(0.002)
    choice = random.Random(5)

    def slowed(compute: Compute) -> Compute:
        def work(*arguments: Any) -> Renewed:
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
    """All on one thread, which is not the training loop's."""
    allowed, threads = threading.Event(), []

    def held(compute: Compute) -> Compute:
        def work(*arguments: Any) -> Renewed:
            threads.append(threading.current_thread())
            assert allowed.wait(60)
            return compute(*arguments)

        return work

    wrap_compute(monkeypatch, held)
    params = some_parameters()
    optimizer = background(params)
    drive(optimizer, params, range(FREQUENCY))  # returns, while the refreshes of its last step are held
    assert pending(optimizer) and not allowed.is_set()
    before = snapshot(params)
    later = threading.Timer(0.2, allowed.set)
    later.start()
    begin = time.perf_counter()
    drive(optimizer, params, [FREQUENCY])
    assert time.perf_counter() - begin > 0.1
    assert not same_bits(snapshot(params), before)
    drive(optimizer, params, range(FREQUENCY + 1, 12))
    assert len(set(threads)) == 1 and threads[0] is not MAIN
    later.join()


def test_what_is_due_is_what_is_due_when_staggered_and_it_counts_one_step_later() -> None:
    params, optimizer = trained(FREQUENCY - 1)
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


@pytest.mark.parametrize("name", list(FORMS))
@pytest.mark.parametrize("way", ["state_dict", "save_shampoo", "asynchronous", "deepcopy", "pickle"])
def test_a_run_resumed_after_any_step_goes_on_bit_for_bit(way: str, name: str, tmp_path: Path) -> None:
    """What was pending is installed by the next step, as in the run that was never stopped."""
    options = FORMS[name]
    params = some_parameters()
    optimizer = background(params, **options)
    states, copies = [], {}
    for step in range(12):
        states.append((snapshot(params), state_of(optimizer)))
        if FREQUENCY <= step <= 2 * FREQUENCY + 1 and (way in ("state_dict", "save_shampoo") or step % 3 == 0):
            copies[step] = another(way, optimizer, params, options, tmp_path / str(step))
            assert len(pending(optimizer)) >= 3
        drive(optimizer, params, [step])
    for step, (copied, other) in copies.items():
        for later in range(step, 12):
            values, state = states[later]
            assert same_bits(snapshot(copied), values), (step, later)
            if later > step:  # before its first step a loaded state waits for the units
                assert same_bits(state_of(other), state), (step, later)
            drive(other, copied, [later])
        assert same_bits(snapshot(copied), snapshot(params))


def another(
    way: str, optimizer: Shampoo, params: list[nn.Parameter], options: dict[str, Any], folder: Path
) -> tuple[list[nn.Parameter], Shampoo]:
    """The optimizer of another process that goes on, and its parameters."""
    if way in ("deepcopy", "pickle"):
        copied, other = copy.deepcopy((params, optimizer)) if way == "deepcopy" else pickle.loads(
            pickle.dumps((params, optimizer))
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
    """A loaded state that waits for its units is saved again as it is."""
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
    """As of other modes, and of versions that had no such mode."""
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


def test_rejected_steps_install_nothing_and_begin_nothing() -> None:
    """Nor does a parameter without a gradient take what it waits for."""
    params, twins = some_parameters(), some_parameters()
    optimizer, twin = background(params), background(twins)
    for step in range(11):
        values, before = snapshot(params), state_of(optimizer)
        for _ in range(2):
            for number, p in enumerate(params):
                p.grad = made_up(p, 50 + step, number)
            params[3].grad.view(-1)[2] = math.nan
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
    """By every step that does, and no state has changed meanwhile."""
    params, optimizer = trained(FREQUENCY - 1)

    def broken(*_: Any) -> Renewed:
        raise ZeroDivisionError("on the thread")

    with monkeypatch.context() as patch:
        patch.setattr(ShampooPreconditioner, "compute", broken)
        drive(optimizer, params, [FREQUENCY - 1])
        with pytest.raises(ZeroDivisionError):  # the thread must have been there before the patch ends
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
    optimizer = background([p], preconditioner=preconditioner, precondition_frequency=1)

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
    word = "eigenbasis" if preconditioner == "soap" else "inverse root"
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"no {word} of block group0.0/0"]
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
    drive(optimizer, [p], range(5))  # three were installed by then; told one step later
    with pytest.raises(RuntimeError, match="failed 3 times in a row"):
        drive(optimizer, [p], range(5, 7))


class Products(TorchDispatchMode):
    """Notes the dtypes of all matrix products on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("mm", "matmul", "mv", "dot", "matrix_power")):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(FORMS))
def test_no_product_of_the_thread_can_see_a_precision_switch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches belong to the process: it neither touches them nor has a float32 product that reads them."""
    seen, switching = Products(), []
    original = roots._ieee_products

    def watched() -> Any:
        switching.append(threading.current_thread())
        return original()

    def watching(compute: Compute) -> Compute:
        def work(*arguments: Any) -> Renewed:
            with seen:
                return compute(*arguments)

        return work

    monkeypatch.setattr(roots, "_ieee_products", watched)
    wrap_compute(monkeypatch, watching)
    _, optimizer = trained(2 * FREQUENCY + 2, **FORMS[name])
    finish(optimizer)
    assert seen.dtypes == {torch.float64}
    assert set(switching) == {MAIN}


@pytest.mark.parametrize("name", list(FORMS))
def test_float32_results_are_those_of_a_refresh_in_the_step(name: str) -> None:
    """To rounding: the same decompositions, with products in float64."""
    _, optimizer = trained(FREQUENCY + 2, **({"relative_epsilon": 1e-3} | FORMS[name]))
    compared = 0
    for stack in (stack for unit in optimizer.units for stack in unit.stacks):
        for row, refresh in stack.pending.items():
            assert refresh is not None
            place, step = row - refresh.first, FREQUENCY + 2
            config = optimizer.configs()[0]
            state = {name: tensor[row : row + 1] for name, tensor in stack.tensors.items()}
            wanted, found = build(config).compute(state, step).tensors, refresh.result().tensors
            assert wanted.keys() == found.keys()
            for key, tensor in wanted.items():
                torch.testing.assert_close(found[key][place], tensor[0], rtol=1e-3, atol=1e-4)
                compared += 1
    assert compared


@pytest.fixture
def other_thread_count() -> Iterator[int]:
    before = torch.get_num_threads()
    yield before + 1
    torch.set_num_threads(before)


def test_the_thread_uses_as_many_cores_as_torch_was_told_to(
    other_thread_count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when told after the thread was there."""
    counts: list[int] = []

    def counting(compute: Compute) -> Compute:
        def work(*arguments: Any) -> Renewed:
            counts.append(torch.get_num_threads())
            return compute(*arguments)

        return work

    wrap_compute(monkeypatch, counting)
    params, optimizer = trained(FREQUENCY)
    finish(optimizer)
    seen = len(counts)
    torch.set_num_threads(other_thread_count)
    drive(optimizer, params, range(FREQUENCY, 2 * FREQUENCY))
    finish(optimizer)
    assert set(counts[:seen]) == {other_thread_count - 1}
    assert set(counts[seen:]) == {other_thread_count}


def test_metrics_count_a_refresh_when_it_is_installed() -> None:
    p = parameter(8, 8)
    optimizer = background([p], precondition_frequency=3)
    drive(optimizer, [p], range(3))
    before = optimizer.metrics()
    assert before["refreshed_share"] == 0.0 and "largest_condition_number" not in before
    drive(optimizer, [p], [3])
    after = optimizer.metrics()
    assert after["refreshed_share"] == 1.0 and after["refresh_ms"] > 0.0
    assert 1.0 < after["largest_condition_number"] < math.inf


class FakeQueue:
    """Stands for streams and events of an accelerator, and notes in one list what is asked of them."""

    log: list[str] = []

    def __init__(self, name: str = "event") -> None:
        self.name = name

    def note(self, what: str, *_: Any, **__: Any) -> None:
        FakeQueue.log.append(f"{self.name} {what}")

    def __getattr__(self, what: str) -> Callable[..., None]:
        return lambda *arguments, **_: self.note(what)

    def __enter__(self) -> None:
        self.note("enter")

    def __exit__(self, *_: Any) -> None:
        self.note("exit")


def test_on_an_accelerator_a_stream_of_its_own_begins_after_the_factors_and_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By stand-ins for the device's queue: the order of what is asked of it."""

    class Result:
        def record_stream(self, stream: FakeQueue) -> None:
            FakeQueue.log.append(f"memory kept for {stream.name}")

    def compute() -> Any:
        FakeQueue.log.append("compute")
        return Renewed({"root_0": Result()}, frozenset())  # type: ignore[dict-item]

    FakeQueue.log.clear()
    monkeypatch.setattr(torch, "Event", lambda *_, **__: FakeQueue("event"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: FakeQueue("main"))
    monkeypatch.setattr(worker, "_stream", lambda _: FakeQueue("side"))
    monkeypatch.setattr(worker, "_load_linear_algebra", lambda _: None)
    monkeypatch.setattr(RefreshMeter, "refreshing", lambda *_: nullcontext())
    refresh = worker.Refresh(compute, 0, torch.device("cuda"))
    assert refresh.result().tensors.keys() == {"root_0"}
    assert FakeQueue.log == [
        "event record", "side enter", "side wait_event", "compute", "side exit", "side synchronize",
        "memory kept for main",
    ]  # fmt: skip


SCRIPT = """
import os, sys, time, torch
from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.preconditioners.shampoo import ShampooPreconditioner
original = ShampooPreconditioner.compute
def slow(*arguments):
    time.sleep(0.2)
    return original(*arguments)
ShampooPreconditioner.compute = slow
weight = torch.nn.Parameter(torch.ones(8, 8))
optimizer = Shampoo([weight], precondition_frequency=1, refresh="background")
def step():
    weight.grad = torch.randn(8, 8)
    optimizer.step()
step()
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )


def test_an_error_ends_the_interpreter_while_a_refresh_is_under_way() -> None:
    done = run(SCRIPT + "1 / 0")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    """Threads do not survive a fork; an optimizer made in the child must not wait for one. Ends amid a refresh."""
    end = """
step()
if os.fork() == 0:
    optimizer = Shampoo([weight], precondition_frequency=1, refresh="background")
    step(); step()
    os._exit(7 if optimizer.state_dict()["shampoo"]["stacks"][0]["refreshed"] == [True] else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
step()
"""
    done = run("import warnings; warnings.simplefilter('ignore')\n" + SCRIPT + end)
    assert done.returncode == 0, done.stderr
