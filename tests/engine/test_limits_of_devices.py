"""What accelerators lack or are short of: memory next to embeddings, float64, calls while a graph is captured."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm import elementwise
from shampoo_deepspeed.distributed.exchange import staged_wire
from shampoo_deepspeed.distributed.frameworks import LayoutError
from shampoo_deepspeed.engine import master_weights
from shampoo_deepspeed.linalg.inverse_root import inverse_root
from shampoo_deepspeed.linalg.precision import independent_of_switches
from tests.support.device_work import counted
from tests.support.simulated_device import DEVICE, Device, Mode, on_device, quiet, simulate, values_of
from tests.support.stepping import made_up, parameter, same_bits

LONG, FEW = 1 << 18, 1 << 12


def stepped(
    device: Device, dtype: torch.dtype = torch.float32, steps: int = 3, **options: Any
) -> tuple[Tensor, float, list[str]]:
    """The weights of a long vector after some steps, and of the last one: bytes for each element, and reads."""
    weight = nn.Parameter(on_device(parameter(LONG).to(dtype)))
    with Mode():
        optimizer = Shampoo([("embedding.weight", weight), ("b", parameter_there(3))], lr=1e-2, **options)
        for step in range(steps):
            weight.grad = on_device(made_up(values_of(weight), step))
            with quiet(device):
                device.catch_up()
            device.peak = before = device.live
            reads = len(device.reads)
            optimizer.step()
    return values_of(weight), (device.peak - before) / LONG, device.reads[reads:]


def parameter_there(*shape: int) -> nn.Parameter:
    return nn.Parameter(on_device(parameter(*shape)))


ELEMENTWISE: list[dict[str, Any]] = [
    {},
    {"normalize_gradients": False},
    {"elementwise": "normalized_adam", "normalize_gradients": False},
    {"elementwise": "rmsprop"},
    {"elementwise": "sgd", "betas": (0.0, 0.99)},
]


@pytest.mark.parametrize("options", ELEMENTWISE, ids=str)
def test_an_element_wise_step_holds_little_more_than_the_update(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Embeddings lie whole on some ranks under ZeRO-1 and ZeRO-2: what is held next to them is memory for nothing."""
    expected, in_one, _ = stepped(simulate(monkeypatch), **options)
    monkeypatch.setattr(elementwise, "TOGETHER_ON_ACCELERATORS", FEW)
    found, in_pieces, reads = stepped(simulate(monkeypatch), **options)
    assert same_bits(found, expected)
    assert in_pieces <= 4.5 < 8.0 <= in_one + (4.0 if options.get("elementwise") == "sgd" else 0.0)
    assert not reads


def test_random_rounding_holds_little_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights in bfloat16 without masters, which are there to save memory."""
    options: dict[str, Any] = {"dtype": torch.bfloat16, "master_weights": False, "stochastic_rounding": True}
    expected, in_one, _ = stepped(simulate(monkeypatch), **options)
    monkeypatch.setattr(master_weights, "TOGETHER", FEW)
    monkeypatch.setattr(elementwise, "TOGETHER_ON_ACCELERATORS", FEW)
    found, in_pieces, reads = stepped(simulate(monkeypatch), **options)
    assert same_bits(found, expected)
    assert in_pieces <= 12.0 < 30.0 <= in_one  # the update, weights in float32 and rounded ones are 10
    assert not reads


@pytest.mark.parametrize(
    ("backends", "wire"), [("cuda:nccl", "cuda:3"), ("cuda:nccl,cpu:gloo", "cuda:3"), ("cpu:gloo", "cpu")]
)
def test_blocks_of_shards_on_the_cpu_travel_by_the_accelerators_backend_where_there_is_one(
    backends: str, wire: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate gives a job both backends if FSDP keeps parameters on the CPU."""
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: backends)
    assert staged_wire(None, torch.device("cuda", 3)) == torch.device(wire)


def test_a_device_without_float64_is_an_error_at_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at the first refresh, hours later."""
    device = simulate(monkeypatch)
    device.float64 = False
    weight = parameter_there(6, 4)
    before = values_of(weight)
    with Mode():
        optimizer = Shampoo([weight])
        weight.grad = on_device(made_up(before, 0))
        with pytest.raises(LayoutError, match="cuda:0 has no float64"):
            optimizer.step()
    assert same_bits(values_of(weight), before)


def test_a_step_within_the_capture_of_a_graph_is_an_error_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    weight = parameter_there(6, 4)
    with Mode():
        optimizer = Shampoo([weight])
        for step, captures in enumerate((False, True, False)):
            monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=captures: now)
            weight.grad = on_device(made_up(values_of(weight), step))
            before = values_of(weight)
            if captures:
                with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"):
                    optimizer.step()
            else:
                optimizer.step()
            assert same_bits(values_of(weight), before) == captures
    assert optimizer.units[0].steps == [2]


@pytest.mark.parametrize(("capability", "slow"), [((9, 0), False), ((8, 0), False), ((8, 9), True), ((10, 3), True)])
@pytest.mark.parametrize("background", [False, True])
def test_no_iteration_is_in_float64_on_devices_where_that_is_slow(
    capability: tuple[int, int], slow: bool, background: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread's products must not depend on the switches of float32, so they are in float64."""
    simulate(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    factor = made_up(torch.empty(2, 8, 8), 1)
    with Mode(), counted() as work:
        matrices = on_device(factor @ factor.mT)
        if background:
            with independent_of_switches():
                inverse_root(matrices, 2, 0.0, 1e-4, torch.float32, "auto")
        else:
            inverse_root(matrices, 2, 0.0, 1e-4, torch.float32, "auto")
    decomposes = slow and background
    assert (work.decomposed > 0) == decomposes
    assert (work.by_name["bmm"] > 10) != decomposes
    assert matrices.device == DEVICE


@pytest.mark.parametrize(("capability", "dtype"), [((9, 0), torch.float64), ((8, 9), torch.float32)])
@pytest.mark.parametrize("solver", ["qr", "eigh"])
def test_no_basis_is_decomposed_in_float64_on_devices_where_that_is_slow(
    capability: tuple[int, int], dtype: torch.dtype, solver: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh, found = torch.linalg.eigh, set[torch.dtype]()

    def noting(matrices: Tensor) -> Any:
        found.add(matrices.dtype)
        return eigh(matrices)

    expected = stepped_by_soap(torch.clone, solver)
    simulate(monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.linalg, "eigh", noting)
    with Mode():
        weight = stepped_by_soap(on_device, solver)
    assert found == {dtype}
    assert (weight - expected).abs().max() < 1e-5


def stepped_by_soap(place: Callable[[Tensor], Tensor], solver: str) -> Tensor:
    weight = nn.Parameter(place(made_up(torch.empty(6, 4), 0)))
    optimizer = Shampoo([weight], preconditioner="soap", solver=solver, precondition_frequency=2)
    for step in range(1, 6):
        weight.grad = place(made_up(torch.empty(6, 4), step))
        optimizer.step()
    return values_of(weight)
