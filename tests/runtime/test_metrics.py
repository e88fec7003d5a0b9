"""`metrics()` covers the steps since its last call: times, bytes, refreshed blocks, condition numbers."""

from __future__ import annotations

import math
import time

import pytest
import torch

from shampoo_deepspeed.linalg.inverse_root import diagonal_root, inverse_root
from shampoo_deepspeed.runtime.metrics import ExchangeMeter, Measured, RefreshMeter, Stopwatch, UpdateMeter, read
from tests.support.stepping import drive, parameter, shampoo

CPU = torch.device("cpu")


def test_metrics_cover_the_steps_since_the_last_call() -> None:
    params = [parameter(12, 10), parameter(4, 6), parameter(5)]
    optimizer = shampoo(params, refresh_growth=0.0)  # refreshes at every third step
    assert optimizer.metrics()["refreshed_share"] == 0.0
    drive(optimizer, params, range(2))
    assert optimizer.metrics() == {
        "refresh_ms": 0.0, "exchange_ms": 0.0, "bytes_moved": 0.0, "refreshed_share": 0.0, "rejected_steps": 0.0,
    }  # fmt: skip
    drive(optimizer, params, range(2, 4))
    refreshed = optimizer.metrics()
    assert refreshed["refresh_ms"] > 0.0 and refreshed["refreshed_share"] == 1.0
    drive(optimizer, params, range(4, 5))
    quiet = optimizer.metrics()
    assert quiet["refresh_ms"] == 0.0 == quiet["refreshed_share"]
    assert quiet["largest_condition_number"] == refreshed["largest_condition_number"]  # of the latest refresh
    assert all(type(value) is float for value in refreshed.values())


def test_a_share_of_the_blocks_is_refreshed() -> None:
    """The steps of two parameters differ by one, so some steps refresh one of them and some the other."""
    first, second = parameter(4, 6), parameter(6, 4)
    optimizer = shampoo([first, second], precondition_frequency=2, refresh_growth=0.0)
    drive(optimizer, [first], range(1))
    shares = []
    for step in range(1, 4):
        drive(optimizer, [first, second], [step])
        shares.append(optimizer.metrics()["refreshed_share"])
    assert shares == [0.5, 0.5, 0.5]
    drive(optimizer, [first, second], range(4, 6))
    assert optimizer.metrics()["refreshed_share"] == 1.0


def test_the_condition_number_is_that_of_the_worst_factor_matrix() -> None:
    """It is that of the matrices of all modes, blocks and stacks, with the ridge of an early step."""
    params = [parameter(12, 10), parameter(4, 6)]
    optimizer = shampoo(params, relative_epsilon=1e-3, early_relative_epsilon=0.01, epsilon=0.0)
    drive(optimizer, params, range(2))
    optimizer.metrics()
    drive(optimizer, params, [2])
    ridge = 0.01 / 3
    wanted = 0.0
    for unit in optimizer.units:
        for stack in unit.stacks:
            for mode in (0, 1):
                values = torch.linalg.eigvalsh(stack.tensors[f"factor_{mode}"].double())
                values = values - values[:, :1].clamp_max(0.0) + ridge * values[:, -1:]
                wanted = max(wanted, (values[:, -1] / values[:, 0]).max().item())
    assert 10 < wanted < 302
    assert optimizer.metrics()["largest_condition_number"] == pytest.approx(wanted, rel=1e-3)


def test_the_condition_number_is_renewed_by_the_next_refresh() -> None:
    params = [parameter(4, 6)]
    optimizer = shampoo(params, relative_epsilon=0.1)
    drive(optimizer, params, range(3))
    first = optimizer.metrics()["largest_condition_number"]
    optimizer.param_groups[0]["relative_epsilon"] = 0.5
    drive(optimizer, params, range(3, 6))
    assert optimizer.metrics()["largest_condition_number"] <= 3.0 < first


def test_rejected_steps_are_counted_in_all_and_are_no_refresh() -> None:
    params = [parameter(4, 6)]
    optimizer = shampoo(params, precondition_frequency=1)
    for _ in range(3):
        params[0].grad = torch.full_like(params[0], math.nan)
        optimizer.step()
    drive(optimizer, params, range(1))
    assert optimizer.metrics()["rejected_steps"] == 3.0
    assert optimizer.metrics()["rejected_steps"] == 3.0


def test_the_update_of_one_step_is_measured_after_each_reading() -> None:
    """It is that of the weights, before the learning rate and decay; frozen and other parameters do not count."""
    params = [parameter(12, 10), parameter(5)]
    optimizer = shampoo(params, lr=1.0, weight_decay=0.0)
    drive(optimizer, params, range(1))
    assert "update_rms" not in optimizer.metrics()
    before = [p.detach().clone() for p in params]
    drive(optimizer, params, range(1, 2))
    moved = torch.cat([(p.detach() - old).flatten() for p, old in zip(params, before, strict=True)])
    drive(optimizer, params, range(2, 4))
    assert optimizer.metrics()["update_rms"] == pytest.approx(moved.square().mean().sqrt().item(), rel=1e-5)
    before, params[1].grad = [p.detach().clone() for p in params], None
    drive(optimizer, params[:1], range(4, 5))
    own = (params[0].detach() - before[0]).square().mean().sqrt().item()
    assert optimizer.metrics()["update_rms"] == pytest.approx(own, rel=1e-5) and optimizer.metrics()["update_rms"] > 0


def test_means_are_over_the_steps_of_each_unit() -> None:
    """ZeRO steps its parameter groups one by one: their means add up to that of a training step."""
    units = []
    for steps, moved in ((4, 40), (2, 6)):
        meter = ExchangeMeter()
        meter.steps, meter.bytes_moved = steps, moved
        units.append(Measured(meter, [], 0, UpdateMeter()))
    assert read(units, 0)["bytes_moved"] == 40 / 4 + 6 / 2
    assert read(units, 0)["bytes_moved"] == 0.0


def test_a_stopwatch_adds_spans_and_resets(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([1.0, 1.25, 7.0, 7.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    watch = Stopwatch()
    for _ in range(2):
        with watch.span(CPU):
            pass
    assert watch.read() == 750.0
    assert watch.read() == 0.0


class FakeEvent:
    """An event of a device that has executed everything up to `FakeEvent.passed`."""

    clock, passed = 0.0, 0.0

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        assert enable_timing

    def record(self, stream: object = None) -> None:
        FakeEvent.clock += 5.0
        self.at = FakeEvent.clock

    def query(self) -> bool:
        return self.at <= FakeEvent.passed

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.query() and later.query(), "this would wait for the device"
        return later.at - self.at


def test_an_accelerator_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time span that the device has not finished is counted by a later call."""
    monkeypatch.setattr(torch, "Event", FakeEvent)
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: None)
    watch = Stopwatch()
    for _ in range(3):  # from 5 to 10, 15 to 20, 25 to 30
        with watch.span(torch.device("cuda")):
            pass
    FakeEvent.passed = 22.0
    assert watch.read() == 10.0
    assert watch.read() == 0.0
    FakeEvent.passed = 30.0
    assert watch.read() == 5.0


def test_matrices_without_a_condition_number_do_not_count() -> None:
    meter = RefreshMeter()
    stack = torch.stack([torch.zeros(3, 3), torch.diag(torch.tensor([1.0, 2.0, 4.0]))])
    with meter.refreshing(CPU) as conditions:
        inverse_root(stack, 4.0, 0.0, 0.0, torch.float32, conditions=conditions)
    assert meter.read_condition() == pytest.approx(4.0)


def test_a_singular_matrix_has_an_infinite_one() -> None:
    meter = RefreshMeter()
    with meter.refreshing(CPU) as conditions:
        diagonal_root(torch.tensor([[0.0, 1.0]]), 4.0, 0.0, 0.0, torch.float32, "shift", conditions)
    assert meter.read_condition() == math.inf


def test_a_refresh_without_eigenvalues_has_none() -> None:
    meter = RefreshMeter()
    with meter.refreshing(CPU):
        pass
    assert meter.read_condition() is None
