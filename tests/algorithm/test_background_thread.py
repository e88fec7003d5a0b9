"""The thread of background refreshes: changes no shared state, follows torch's thread count, ends with its process."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_deepspeed.algorithm import background as worker
from shampoo_deepspeed.algorithm.preconditioners import build
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.linalg import precision
from shampoo_deepspeed.runtime.metrics import RefreshMeter
from tests.support.backgrounds import FORMS, FREQUENCY, Compute, finish, trained, wrap_compute
from tests.support.stepping import drive

MAIN = threading.current_thread()


class Products(TorchDispatchMode):
    """Records the dtypes of all matrix products on this thread."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(function) for name in ("mm", "matmul", "mv", "dot", "matrix_power")):
            self.dtypes.add(args[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", list(FORMS))
def test_no_product_of_the_thread_can_see_a_precision_switch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches belong to the process; the thread neither sets them nor has float32 products, which read them."""
    seen, switching = Products(), []
    original = precision._ieee_products

    def watched() -> Any:
        switching.append(threading.current_thread())
        return original()

    def watching(compute: Compute) -> Compute:
        def work(*arguments: Any) -> RefreshResult:
            with seen:
                return compute(*arguments)

        return work

    monkeypatch.setattr(precision, "_ieee_products", watched)
    wrap_compute(monkeypatch, watching)
    _, optimizer = trained(2 * FREQUENCY + 2, **FORMS[name])
    finish(optimizer)
    assert seen.dtypes == {torch.float64}
    assert set(switching) == {MAIN}


@pytest.mark.parametrize("name", list(FORMS))
def test_float32_results_are_those_of_a_refresh_in_the_step(name: str) -> None:
    """They are equal up to rounding: decompositions are the same, and products are in float64."""
    _, optimizer = trained(FREQUENCY + 2, **({"relative_epsilon": 1e-3} | FORMS[name]))
    compared = 0
    for stack in (stack for unit in optimizer.units for stack in unit.stacks):
        for row, refresh in stack.pending.items():
            assert refresh is not None
            place, step = row - refresh.first, FREQUENCY + 2
            config = optimizer.configs()[0]
            state = stack._opened(slice(row, row + 1), step)  # as the mathematics sees it
            wanted, found = build(config).compute(state, step, []).tensors, refresh.result().tensors
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
    """This holds even if the count is set after the thread was started."""
    counts: list[int] = []

    def counting(compute: Compute) -> Compute:
        def work(*arguments: Any) -> RefreshResult:
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


class FakeQueue:
    """Stands in for streams and events of an accelerator, and records all calls in one list."""

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
    """Stand-ins for the device's queue record the order of calls."""

    class Result:
        def record_stream(self, stream: FakeQueue) -> None:
            FakeQueue.log.append(f"memory kept for {stream.name}")

    def compute(conditions: list[Tensor]) -> Any:
        FakeQueue.log.append("compute")
        return RefreshResult({"root_0": Result()}, frozenset())  # type: ignore[dict-item]

    FakeQueue.log.clear()
    monkeypatch.setattr(torch, "Event", lambda *_, **__: FakeQueue("event"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda *_: FakeQueue("main"))
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda d: FakeQueue.log.append(f"thread on {d}"))
    monkeypatch.setattr(worker, "_stream", lambda _: FakeQueue("side"))
    monkeypatch.setattr(worker, "_load_linear_algebra", lambda _: None)
    monkeypatch.setattr(RefreshMeter, "refreshing", lambda *_: nullcontext([]))
    refresh = worker.Refresh(compute, 0, torch.device("cuda", 1))
    assert refresh.result().tensors.keys() == {"root_0"}
    assert FakeQueue.log == [
        "event record", "thread on cuda:1", "side enter", "side wait_event", "compute", "side exit", "side synchronize",
        "memory kept for main",
    ]  # fmt: skip


SCRIPT = """
import os, sys, time, torch
from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm.preconditioners.shampoo import KLShampooPreconditioner
original = KLShampooPreconditioner.compute
def slow(*arguments):
    time.sleep(0.2)
    return original(*arguments)
KLShampooPreconditioner.compute = slow
weight = torch.nn.Parameter(torch.ones(8, 8))
options = {"precondition_frequency": 1, "start_preconditioning_step": 1, "refresh": "background"}
optimizer = Shampoo([weight], **options)
def step():
    weight.grad = torch.randn(8, 8)
    optimizer.step()
step()
"""


def run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_an_error_ends_the_interpreter_while_a_refresh_is_under_way() -> None:
    done = run(SCRIPT + "1 / 0")
    assert done.returncode == 1
    assert done.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.slow
def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    """Threads do not survive a fork, so the child's optimizer must not wait for one. The child exits in a refresh."""
    end = """
step()
if os.fork() == 0:
    optimizer = Shampoo([weight], **options)
    step(); step()
    os._exit(7 if optimizer.state_dict()["shampoo"]["stacks"][0]["refreshed"] == [True] else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
step()
"""
    done = run("import warnings; warnings.simplefilter('ignore')\n" + SCRIPT + end)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_forked_process_goes_on_with_a_refresh_that_is_under_way() -> None:
    """It starts the refresh again and trains as the parent does, also with OpenMP, and its exit waits for nothing."""
    end = """
import signal
torch.manual_seed(0)
step()
child = os.fork()
if child == 0:
    signal.alarm(60)
step(); step()
print(weight.detach().double().sum().item(), flush=True)
if child == 0:
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""
    done = run("import warnings; warnings.simplefilter('ignore')\n" + SCRIPT + "torch.set_num_threads(2)\n" + end)
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.split()
    assert ours == theirs
