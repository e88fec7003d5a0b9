"""What a rank does in the checks of the planner: trains a few steps, and returns what it holds and what it moved."""

from __future__ import annotations

from typing import Any

from shampoo_deepspeed import Shampoo
from tests.distributed.ranks import fsdp, zero
from tests.support.fsdp_runs import Run
from tests.support.scenarios import Scenario


def sharded(run: Run) -> dict[str, Any]:
    """Train under DDP, FSDP2 or HSDP."""
    model, mesh = fsdp.sharded(run)
    optimizer = Shampoo(model.named_parameters(), model=model, **run.options())
    fsdp.trained(model, optimizer, mesh, run)
    return holdings(optimizer)


def partitioned(scenario: Scenario) -> dict[str, Any]:
    """Train under ZeRO."""
    with zero.engine_of(scenario) as engine:
        zero.train(engine, scenario, range(scenario.steps))
        return holdings(engine.basic_optimizer)


def holdings(optimizer: Shampoo) -> dict[str, Any]:
    """Return the trained parameters in the optimizer's order, bytes of state by kind, and bytes of the last step."""
    tensors: list[tuple[str, int]] = []
    for unit in optimizer.units:
        for stack in unit.stacks:
            tensors += [(name, tensor.nbytes) for name, tensor in stack.tensors.items()]
        tensors += [(name, tensor.nbytes) for name, tensor in unit.elementwise.tensors]
        for kind, buffers in unit.buffers.items():
            tensors += [(kind, buffer.nbytes) for buffer in buffers.values()]
    entries = [(entry.parameter, entry.reference()) for entry in optimizer.entries]
    return {
        "parameters": [p for p, tensor in entries if tensor is not None and tensor.requires_grad],
        "state": sum(nbytes for _, nbytes in tensors),
        "roots": sum(nbytes for name, nbytes in tensors if name.startswith("root_")),
        "units": len(optimizer.units),
        **optimizer.comm_stats(),
    }
