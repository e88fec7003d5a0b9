"""What a rank does in the checks on a simulated accelerator: trains replicas over a group like NCCL's, with faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo
from tests.support.simulated_device import Device, Mode, as_nccl, on_device, simulate, values_of
from tests.support.stepping import made_up, parameter

SHAPES = {"vector": (5,), "matrix": (6, 4), "conv": (4, 6, 2), "wide": (4, 12)}
STEPS, FAULTY = 9, 4
OPTIONS: dict[str, Any] = {"lr": 1e-2, "precondition_frequency": 1, "max_preconditioner_dim": 4, "solver": "eigh"}
OPTIONS |= {"refresh_growth": 0.0, "bucket_mb": 1e-4, "preconditioner": "shampoo"}


def stepped(optimizer: Shampoo, params: list[nn.Parameter], step: int, there: bool) -> None:
    """Take a step with the same gradients on all ranks."""
    for number, p in enumerate(params):
        gradient = made_up(values_of(p), step, number)
        p.grad = on_device(gradient) if there else gradient
    optimizer.step()


def run(case: str, device: Device | None) -> dict[str, Any]:
    """Train, with a fault on the second rank if the case has one; return weights, what was mixed, and any error."""
    there = device is not None and "offloaded" not in case
    made = [parameter(*shape, seed=n) for n, shape in enumerate(SHAPES.values())]
    params = [nn.Parameter(on_device(p)) if there else p for p in made]
    group = None if device is None else dist.group.WORLD
    optimizer = Shampoo(zip(SHAPES, params, strict=True), process_group=group, **OPTIONS)
    second = device is not None and dist.get_rank() == 1
    seen: dict[str, Any] = {"error": "", "sent": 0}
    try:
        for step in range(STEPS):
            if device is not None:
                device.failing.clear()
                if second and case == "no_memory_at_first":  # new state is made of zeros
                    device.failing["aten::zeros"] = torch.OutOfMemoryError("CUDA out of memory")
                if second and step == FAULTY and case.startswith("refresh"):
                    device.failing["aten::_linalg_eigh"] = torch.OutOfMemoryError("CUDA out of memory")
            stepped(optimizer, params, step, there)
            if device is not None:
                device.catch_up()
    except RuntimeError as error:
        seen["error"] = f"{type(error).__name__}: {error}"
    seen["weights"] = [values_of(p) for p in params]
    if device is not None:
        seen["mixed"], seen["collectives"] = (
            list(device.mixed),
            optimizer.units[0].exchange.stats.collectives if optimizer.units else 0,
        )
        seen["devices"] = sorted({str(t.device) for u in optimizer.units for s in u.stacks for t in s.tensors.values()})
    return seen


def trained(case: str) -> dict[str, Any]:
    """The run of a case, and the weights of one process on the CPU that does the same."""
    expected: list[Tensor] = run(case, None)["weights"]
    with pytest.MonkeyPatch.context() as patch, Mode():
        device = simulate(patch)
        patch.setattr(torch.cuda, "empty_cache", lambda: None)
        world = dist.group.WORLD
        assert world is not None
        if "gloo" not in case:
            as_nccl(patch, world)
        seen = run(case, device)
    seen["apart"] = max(float((a - b).abs().max()) for a, b in zip(seen["weights"], expected, strict=True))
    return seen
