"""Global precision switches change nothing in a step, and a step leaves them as they were."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed.algorithm.preconditioners.shampoo import ShampooPreconditioner
from shampoo_deepspeed.linalg.precision import full_precision
from tests.support.precision_switches import NEW_NAMES, SWITCHES, backends, readings
from tests.support.precision_switches import restored_switches as restored_switches
from tests.support.simulated_device import Mode, on_device, simulate
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot


def trained() -> list[Tensor]:
    params = [parameter(12, 10), parameter(5)]
    drive(shampoo(params), params, range(7))
    return snapshot(params)


@pytest.mark.parametrize("name", list(SWITCHES))
def test_a_step_gives_the_same_bits_under_every_switch_and_restores_it(name: str) -> None:
    expected = trained()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SWITCHES[name]()
        before = readings()
        found = trained()
    assert readings() == before
    assert same_bits(found, expected)


@pytest.mark.parametrize("name", list(SWITCHES))
def test_products_of_a_step_run_in_full_precision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The switches themselves are checked during the step, because they have no effect on some machines."""
    SWITCHES[name]()
    seen: list[tuple[str, str]] = []

    def spy(kept: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: Any) -> Any:
            if NEW_NAMES:
                seen.append((backends.cuda.matmul.fp32_precision, backends.mkldnn.matmul.fp32_precision))
            else:
                seen.append((torch.get_float32_matmul_precision(),) * 2)
            return kept(*args)

        return watched

    for method in ("accumulate", "compute", "install", "apply"):
        monkeypatch.setattr(ShampooPreconditioner, method, spy(getattr(ShampooPreconditioner, method)))
    trained()
    assert len(seen) > 10
    assert set(seen) == {("ieee", "ieee") if NEW_NAMES else ("highest", "highest")}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_enclosing_autocast_changes_nothing(dtype: torch.dtype) -> None:
    """Some training loops step inside autocast; products would then have its dtype."""
    expected = trained()
    with torch.autocast("cpu", dtype=dtype):
        found = trained()
        assert torch.is_autocast_enabled("cpu")
    assert same_bits(found, expected)


def test_a_step_that_fails_restores_the_switches_too() -> None:
    torch.set_float32_matmul_precision("high")
    before = readings()
    with pytest.raises(ZeroDivisionError), full_precision("cpu"):
        raise ZeroDivisionError
    assert readings() == before


@pytest.mark.skipif(not NEW_NAMES, reason="in torch 2.8 no switch inherits from another")
def test_what_was_inherited_is_inherited_afterwards() -> None:
    """A step must not fix the backends' switches at the value that they inherit from the generic switch."""
    model = nn.Linear(6, 5)
    drive(shampoo(model.parameters()), list(model.parameters()), range(2))
    for value in ("tf32", "ieee"):
        backends.fp32_precision = value
        assert backends.cuda.matmul.fp32_precision == value
        drive(shampoo(model.parameters()), list(model.parameters()), range(2))
        assert backends.cuda.matmul.fp32_precision == value


@pytest.mark.slow
def test_the_old_names_can_be_read_after_a_step_where_only_they_were_used() -> None:
    """It needs its own process, because torch remembers which names were used; later torch code reads the old ones."""
    script = """
import torch
from shampoo_deepspeed import Shampoo
torch.set_float32_matmul_precision("high")
weight = torch.nn.Parameter(torch.ones(4, 4))
optimizer = Shampoo([weight])
weight.grad = torch.eye(4)
optimizer.step()
assert torch.get_float32_matmul_precision() == "high"
assert torch.backends.cuda.matmul.allow_tf32
torch.set_float32_matmul_precision("highest")
optimizer.step()
assert torch.get_float32_matmul_precision() == "highest"
assert not torch.backends.cuda.matmul.allow_tf32
torch.backends.cuda.matmul.allow_tf32 = True
optimizer.step()
assert torch.backends.cuda.matmul.allow_tf32
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["none", "legacy_medium"])
@pytest.mark.parametrize("fails", [False, True])
def test_steps_on_several_threads_leave_the_process_as_it_was(name: str, fails: bool) -> None:
    """They overlap: the second begins within the first and ends after it."""
    SWITCHES[name]()
    before = readings()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()
    within: list[Any] = []

    def first() -> None:
        with suppress(KeyboardInterrupt), full_precision("cpu"):
            first_in.set()
            assert second_in.wait(60)
            if fails:
                raise KeyboardInterrupt
        first_out.set()

    def second() -> None:
        assert first_in.wait(60)
        with full_precision("cpu"):
            second_in.set()
            assert first_out.wait(60)
            within.append(readings()["legacy"] if not NEW_NAMES else readings()["cpu"])

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert within == ["ieee" if NEW_NAMES else "highest"]
    assert readings() == before


def test_two_optimizers_on_two_threads_train_as_they_do_one_after_the_other() -> None:
    expected = trained()
    before, found = readings(), dict[int, list[Tensor]]()
    threads = [threading.Thread(target=lambda n=n: found.update({n: trained()})) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert all(same_bits(found[n], expected) for n in range(2))
    assert readings() == before and torch.is_grad_enabled()


@pytest.mark.slow
def test_a_process_that_is_forked_during_a_step_of_another_thread_has_the_switches_of_the_script() -> None:
    script = """
import os, threading, warnings
warnings.simplefilter("ignore")
import torch
from shampoo_deepspeed.linalg.precision import full_precision
torch.set_float32_matmul_precision("medium")
inside, leave = threading.Event(), threading.Event()
def step():
    with full_precision("cpu"):
        inside.set()
        leave.wait()
thread = threading.Thread(target=step)
thread.start()
inside.wait()
if os.fork() == 0:
    right = torch.get_float32_matmul_precision() == "medium"
    with full_precision("cpu"):
        pass
    os._exit(7 if right and torch.get_float32_matmul_precision() == "medium" else 1)
assert os.waitstatus_to_exitcode(os.wait()[1]) == 7
leave.set()
thread.join()
assert torch.get_float32_matmul_precision() == "medium"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("name", list(SWITCHES))
def test_the_older_switch_can_be_read_in_a_step_wherever_it_could_before(
    name: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's tuner of products (TunableOp) reads it at each float32 product, and an error there would end the step."""
    SWITCHES[name]()
    before = readings()
    seen: set[Any] = set()
    for product in ("bmm", "baddbmm"):
        kept = getattr(torch, product)

        def watched(*args: Any, kept: Callable[..., Any] = kept, **kwargs: Any) -> Any:
            seen.add(readings()["legacy"])
            return kept(*args, **kwargs)

        monkeypatch.setattr(torch, product, watched)
    simulate(monkeypatch)
    with Mode():
        weight = nn.Parameter(on_device(parameter(12, 10)))
        optimizer = shampoo([weight], matmul_precision=precision, preconditioner="soap_muon")
        optimizer_of_blocks = shampoo([weight], matmul_precision=precision)
        for current in (optimizer, optimizer_of_blocks):
            for step in range(4):
                weight.grad = on_device(made_up(torch.empty(12, 10), step))
                current.step()
    assert readings() == before
    if before["legacy"] in ("highest", "high", "medium"):
        assert seen == ({"highest"} if precision == "highest" else {"highest", "high"})
