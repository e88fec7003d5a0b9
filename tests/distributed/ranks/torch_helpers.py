"""What a rank does in the checks of torch's own helpers for distributed checkpoints: saves, loads and continues.

This file is separate from checks with Transformers, because importing that takes seconds on each rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shampoo_deepspeed import Shampoo
from tests.distributed.ranks.folders import shared_folder
from tests.distributed.ranks.fsdp import full
from tests.support import zoo

STEPS, SAVED = 7, 4  # refreshes at 3 and 6
OPTIONS: dict[str, Any] = {
    "lr": 1e-2, "weight_decay": 0.1, "precondition_frequency": 3, "max_preconditioner_dim": 8, "momentum": 0.5,
    "relative_epsilon": 1e-3, "eps": 1e-4, "no_decay": (), "exclude": ("embed*",),
}  # fmt: skip


def helpers(argument: tuple[str, bool, bool]) -> list[dict[str, Tensor]]:
    """Return parameters of an uninterrupted run, and of runs resumed by torch's helpers: sharded alike, and unsharded.

    The argument has the layout, whether the first rank gathers full state dicts, and whether they are flattened.
    """
    layout, gathered, flat = argument
    options = StateDictOptions(
        full_state_dict=gathered,
        cpu_offload=gathered,
        broadcast_from_rank0=gathered,
        flatten_optimizer_state_dict=flat,
    )
    with shared_folder() as folder:
        model, optimizer = sharded(layout)
        steps(model, optimizer, range(SAVED), layout)
        gradient = next(model.parameters()).grad
        assert gradient is not None
        gradient.fill_(float("nan"))
        optimizer.step()
        weights = {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}
        if layout == "ddp":
            optimizer.consolidate_state_dict()
        state: Any = get_optimizer_state_dict(model, optimizer, options=options)
        again, second = sharded(layout, weights)
        if gathered:
            set_optimizer_state_dict(again, second, state, options=options)
        else:
            dcp.save({"optimizer": state}, checkpoint_id=folder)
            loaded: Any = {"optimizer": get_optimizer_state_dict(again, second, options=options)}
            dcp.load(loaded, checkpoint_id=folder)
            set_optimizer_state_dict(again, second, loaded["optimizer"], options=options)
        runs = [(model, optimizer, layout), (again, second, layout)]
        if not gathered and not flat:
            runs.append((*on_one_rank(weights, folder), "whole"))
        for trained, its, how in runs:
            assert its.rejected_steps == 1
            steps(trained, its, range(SAVED, STEPS), how)
        return [{n.removeprefix("module."): full(p) for n, p in trained.named_parameters()} for trained, _, _ in runs]


def sharded(layout: str, weights: dict[str, Tensor] | None = None) -> tuple[nn.Module, Shampoo]:
    model = zoo.make_model("wide")
    if weights is not None:
        model.load_state_dict(weights)
    world = dist.get_world_size()
    if layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, Shampoo(wrapped.named_parameters(), model=wrapped, **OPTIONS)
    return model, Shampoo(model.named_parameters(), **OPTIONS)


def on_one_rank(weights: dict[str, Tensor], folder: Path) -> tuple[nn.Module, Shampoo]:
    """Return an unsharded model and optimizer on each rank."""
    model, optimizer = sharded("whole", weights)
    state: Any = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return model, optimizer


def steps(model: nn.Module, optimizer: Shampoo, numbers: range, layout: str) -> None:
    parts = 1 if layout == "whole" else dist.get_world_size()
    for step in numbers:
        (piece,) = zoo.micro_batches(zoo.make_batch("wide", step), dist.get_rank() % parts, parts)
        optimizer.zero_grad()
        model(**piece).backward()
        optimizer.step()
