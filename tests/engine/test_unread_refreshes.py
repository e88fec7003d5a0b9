"""Later refreshes on a (simulated) accelerator: what fails keeps the old tensors, and the CPU is told a step later."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.linalg.precision import full_precision
from tests.support.simulated_device import DEVICE, Device, Mode, on_device, simulate, values_of
from tests.support.stepping import made_up

BLOCKS = 3
WAYS = [
    ("shampoo", "qr"), ("shampoo", "coupled_newton"), ("shampoo", "eigh"), ("kl_shampoo", "qr"), ("soap", "qr"),
    ("soap", "eigh"), ("kl_soap", "qr"),
]  # fmt: skip


def refreshed_stack(preconditioner: str, solver: str, **more: Any) -> tuple[BlockStack, ShampooConfig]:
    """A stack that refreshes in each step, and its options, after three steps."""
    options: dict[str, Any] = {"precondition_frequency": 1, "refresh": "sync", "refresh_growth": 0.0, **more}
    config = ShampooConfig(preconditioner=preconditioner, solver=solver, **options)
    stack = BlockStack([f"a/{n}" for n in range(BLOCKS)], (6, 4), config, DEVICE, torch.float32)
    for number in range(1, 4):
        advance(stack, config, number)
    assert all(stack.refreshed) and not any(stack.failures)
    return stack, config


def advance(stack: BlockStack, config: ShampooConfig, number: int, found_inf: FoundInf | None = None) -> None:
    gradients = on_device(made_up(torch.empty(BLOCKS, *stack.shape), number))
    with full_precision("cuda"):
        stack.step(0, gradients, [number] * BLOCKS, config, found_inf)


def kept(stack: BlockStack) -> dict[str, torch.Tensor]:
    return {n: values_of(t) for n, t in stack.tensors.items() if n.startswith(("root_", "basis_", "whitening_"))}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    return simulate(monkeypatch)


@pytest.mark.parametrize(("preconditioner", "solver"), WAYS)
def test_a_block_that_fails_keeps_its_roots_and_counts_a_step_later(
    preconditioner: str, solver: str, device: Device
) -> None:
    with Mode():
        stack, config = refreshed_stack(preconditioner, solver)
        device.catch_up()
        stack.tensors["factor_0"].held_values[1] = torch.nan  # type: ignore[attr-defined]
        before, reads = kept(stack), len(device.reads)
        advance(stack, config, 4)
        assert len(device.reads) == reads
        device.catch_up()
        assert stack.failures == [0, 1, 0] and len(device.reads) == reads
    for name, tensor in kept(stack).items():
        assert torch.equal(tensor[1], before[name][1]), name
        assert not torch.equal(tensor[0], before[name][0]) and tensor.isfinite().all()


@pytest.mark.parametrize("solver", ["coupled_newton", "eigh"])
def test_the_refresh_after_a_failure_tries_other_ways(solver: str, device: Device) -> None:
    with Mode():
        stack, config = refreshed_stack("shampoo", solver)
        good = values_of(stack.tensors["factor_0"])
        stack.tensors["factor_0"].held_values[1] = torch.nan  # type: ignore[attr-defined]
        advance(stack, config, 4)
        device.catch_up()
        assert stack.failures == [0, 1, 0]
        stack.tensors["factor_0"].held_values[1] = good[1]  # type: ignore[attr-defined]
        reads = len(device.reads)
        advance(stack, config, 5)
        assert len(device.reads) > reads  # it looks at what became of each block
        assert stack.failures == [0, 0, 0]
        device.catch_up()
        reads = len(device.reads)
        advance(stack, config, 6)
        assert len(device.reads) == reads


@pytest.mark.parametrize(("preconditioner", "solver"), WAYS)
def test_a_rejected_step_with_a_refresh_reads_nothing_and_changes_nothing(
    preconditioner: str, solver: str, device: Device
) -> None:
    with Mode():
        stack, config = refreshed_stack(preconditioner, solver)
        device.catch_up()
        before, reads = {n: values_of(t) for n, t in stack.tensors.items()}, len(device.reads)
        flag = on_device(torch.tensor(True))
        found_inf = FoundInf(flag, torch.float32, lambda: True)
        with full_precision("cuda"):
            stack.step(0, on_device(torch.zeros(BLOCKS, 6, 4)), [4] * BLOCKS, config, found_inf)
        assert len(device.reads) == reads
        device.catch_up()
        assert stack.failures == [0, 0, 0]
    for name, tensor in stack.tensors.items():
        assert torch.equal(values_of(tensor), before[name]), name
