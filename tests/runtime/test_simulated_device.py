"""The simulated device notices what a real one punishes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.simulated_device import (
    DEVICE,
    SECOND,
    Device,
    Mode,
    OnDevice,
    is_pinned,
    on_device,
    quiet,
    simulate,
    values_of,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    found = simulate(monkeypatch)
    with Mode():
        yield found


def there(*values: float) -> Tensor:
    return on_device(torch.tensor(values))


def pinned(count: int) -> Tensor:
    return torch.empty(count, pin_memory=True)


WAITS: dict[str, Callable[[], Any]] = {
    "item": lambda: there(1.0).item(),
    "float": lambda: float(there(1.0)),
    "bool": lambda: bool(there(1.0).any()),
    "list": lambda: there(1.0, 2.0).tolist(),
    "to the CPU": lambda: there(1.0).cpu(),
    "by name": lambda: there(1.0).to("cpu"),
    "non-blocking into memory that is not pinned": lambda: there(1.0).to("cpu", non_blocking=True),
    "copied": lambda: torch.zeros(1).copy_(there(1.0)),
    "new numbers": lambda: torch.tensor([1.0], device=DEVICE),
    "moved there": lambda: torch.zeros(2).to(DEVICE),
    "copied there": lambda: there(1.0).copy_(torch.zeros(1)),
    "listed copies": lambda: torch._foreach_copy_([there(1.0)], [torch.zeros(1)]),
    "nonzero": lambda: there(1.0).nonzero(),
    "mask": lambda: there(1.0, 2.0)[there(1.0, 2.0) > 1.0],
    "rows": lambda: there(1.0, 2.0)[[1]],
    "written by a mask": lambda: there(1.0, 2.0).index_put_((there(1.0, 2.0) > 1.0,), there(1.0)[[0]]),
    "equal": lambda: torch.equal(there(1.0), there(1.0)),
    "unique": lambda: there(1.0, 1.0).unique(),
}
WAITS_FOR_NOTHING: dict[str, Callable[[], Any]] = {
    "sum": lambda: there(1.0, 2.0).sum() + 3.0,
    "scalar": lambda: torch.full((), 2.0, device=DEVICE) * there(1.0),
    "CPU's scalar": lambda: there(1.0, 2.0) * torch.tensor(2.0),
    "filled by a mask": lambda: there(1.0, 2.0).masked_fill_(there(1.0, 2.0) > 1.0, 0.0),
    "set by a mask": lambda: there(1.0, 2.0).__setitem__(there(1.0, 2.0) > 1.0, 0.0),
    "slice": lambda: there(1.0, 2.0)[1:].copy_(there(1.0)),
    "where": lambda: torch.where(there(1.0) > 0, there(1.0), 0.0),
    "pinned": lambda: pinned(2).copy_(there(1.0, 2.0), non_blocking=True),
    "pinned there": lambda: there(1.0, 2.0).copy_(pinned(2).zero_(), non_blocking=True),
    "norms": lambda: torch._foreach_norm([there(1.0), there(2.0)], 2),
    "decomposition": lambda: torch.linalg.eigh(torch.eye(2, device=DEVICE)),
    "product": lambda: there(1.0, 2.0).view(1, 2) @ there(1.0, 2.0).view(2, 1),
}


@pytest.mark.parametrize("case", WAITS)
def test_what_the_cpu_waits_for_is_noticed(case: str, device: Device) -> None:
    WAITS[case]()
    assert device.reads and not device.mixed


@pytest.mark.parametrize("case", WAITS_FOR_NOTHING)
def test_what_it_does_not_wait_for_is_not(case: str, device: Device) -> None:
    WAITS_FOR_NOTHING[case]()
    assert not device.reads and not device.mixed


def test_a_copy_is_under_way_until_its_event_is_waited_for_or_the_device_catches_up(device: Device) -> None:
    target = pinned(2)
    assert is_pinned(target) and not is_pinned(torch.zeros(2))
    target.copy_(there(1.0, 2.0), non_blocking=True)
    assert target.isnan().all()
    event = torch.Event(DEVICE)
    event.record()
    assert not event.query() and target.isnan().all() and not device.reads
    event.synchronize()
    assert target.tolist() == [1.0, 2.0] and len(device.reads) == 1
    target.copy_(there(3.0, 4.0), non_blocking=True)
    event.record()
    device.catch_up()
    event.synchronize()
    assert target.tolist() == [3.0, 4.0] and len(device.reads) == 1


@pytest.mark.parametrize("other", [lambda: torch.ones(2), lambda: OnDevice(torch.ones(2), SECOND.index)])
def test_an_operator_on_two_devices_is_noticed(other: Callable[[], Tensor], device: Device) -> None:
    assert not device.mixed
    there(1.0, 2.0) + other()
    assert device.mixed


def test_tensors_are_where_they_were_asked_for(device: Device) -> None:
    for index in (0, 1):
        torch.accelerator.set_device_index(index)
        assert torch.zeros(2, device="cuda").device.index == index
    found = there(1.0, 2.0)
    assert found.device == found.new_zeros(2).device == torch.zeros_like(found).device == found.double().device
    assert found.new_zeros(2, device="cpu").device == found.cpu().device == torch.device("cpu")
    assert found.to(DEVICE) is found and found.to(DEVICE, copy=True) is not found
    assert torch.zeros(2, device=SECOND).to(found.device).device == DEVICE


def test_views_share_memory_and_in_place_operators_return_what_they_changed(device: Device) -> None:
    whole = torch.zeros(2, 3, device=DEVICE)
    part = whole.view(-1)[2:4]
    assert part.add_(1.0) is part and part.storage_offset() == 2
    assert values_of(whole).tolist() == [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    held = device.live
    del whole
    assert device.live == held == 24
    del part
    gc.collect()
    assert device.live == 0 and device.peak >= 24


def test_a_model_can_be_trained_there(device: Device) -> None:
    model = nn.Linear(3, 2, device=DEVICE)
    model(torch.ones(4, 3, device=DEVICE)).square().sum().backward()
    assert model.weight.grad is not None and model.weight.grad.device == DEVICE
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not device.mixed


def test_memory_is_limited_and_operators_can_fail(device: Device) -> None:
    device.limit = device.live + 100
    kept = torch.zeros(20, device=DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(20, device=DEVICE)
    del kept
    gc.collect()
    torch.zeros(20, device=DEVICE)
    device.failing["aten::_linalg_eigh"] = RuntimeError("cusolver error")
    with pytest.raises(RuntimeError, match="cusolver"):
        torch.linalg.eigh(torch.eye(2, device=DEVICE))
    torch.linalg.eigh(torch.eye(2))


def test_a_device_may_lack_float64(device: Device) -> None:
    there(1.0).double()
    device.float64 = False
    with pytest.raises(TypeError, match="float64"):
        there(1.0).double()
    torch.zeros(2, dtype=torch.float64)


def test_operators_are_counted_and_a_tests_own_reads_are_not(device: Device) -> None:
    there(1.0).add(2.0).view(-1).mul_(3.0)
    with quiet(device):
        there(1.0).add(2.0).item()
    assert device.operators == {"aten::add": 1, "aten::mul_": 1} and not device.reads
