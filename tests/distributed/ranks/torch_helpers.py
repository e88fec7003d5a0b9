"""What a rank does in the checks of torch's own helpers for distributed checkpoints: saves, loads and continues.

This file is separate from checks with Transformers, because importing that takes seconds on each rank.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
from torch.distributed.optim import ZeroRedundancyOptimizer

from shampoo_deepspeed import LayoutError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.integrations.load_planner import ConvertingLoadPlanner
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


def into_other_formats(argument: tuple[str, bool, dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
    """Return what becomes of a run whose state is loaded into other formats, by ``dcp.load`` or gathered.

    The argument has the layout, whether the first rank gathers full state dicts, and the formats before and after. The
    result has the parameters of the uninterrupted run and of the converted one a step later, those at the save, the
    warnings, the new optimizer's options and dtypes, and the error of torch's default planner.
    """
    layout, gathered, before, after = argument
    options = StateDictOptions(full_state_dict=gathered, cpu_offload=gathered, broadcast_from_rank0=gathered)
    error, messages = "", Messages()
    with shared_folder() as folder:
        model, optimizer = sharded(layout, **before)
        steps(model, optimizer, range(SAVED), layout)
        weights = {n: full(p) for n, p in model.named_parameters()}
        state: Any = get_optimizer_state_dict(model, optimizer, options=options)
        again, second = sharded(layout, weights, **after)
        logging.getLogger("shampoo_deepspeed").addHandler(messages)
        if gathered:
            set_optimizer_state_dict(again, second, state, options=options)
        else:
            dcp.save({"optimizer": state}, checkpoint_id=folder)
            try:
                dcp.load({"optimizer": get_optimizer_state_dict(again, second)}, checkpoint_id=folder)
            except dcp.CheckpointException as raised:
                error = str(raised)
            loaded: Any = {"optimizer": get_optimizer_state_dict(again, second)}
            dcp.load(loaded, checkpoint_id=folder, planner=ConvertingLoadPlanner())
            set_optimizer_state_dict(again, second, loaded["optimizer"])
        for trained, its in ((model, optimizer), (again, second)):
            steps(trained, its, range(SAVED, SAVED + 1), layout)
        logging.getLogger("shampoo_deepspeed").removeHandler(messages)
    now, converted = ({n: full(p) for n, p in trained.named_parameters()} for trained in (model, again))
    dtypes = {str(t.dtype) for unit in second.units for stack in unit.stacks for t in stack.tensors.values()}
    dtypes |= {str(t.dtype) for unit in second.units for _, t in unit.elementwise.tensors}
    options_now = {name: second.param_groups[0][name] for name in FORMATS}
    found = {"uninterrupted": now, "converted": converted, "saved": weights, "messages": messages.texts}
    return found | {"options": options_now, "dtypes": dtypes, "error": error}


FORMATS = ("factor_format", "root_format", "moment_format", "elementwise_format")


class Messages(logging.Handler):
    """Collects what is logged."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def sharded(layout: str, weights: dict[str, Tensor] | None = None, **given: Any) -> tuple[nn.Module, Shampoo]:
    model, options = zoo.make_model("wide"), {**OPTIONS, **given}
    if weights is not None:
        model.load_state_dict(weights)
    world = dist.get_world_size()
    if layout == "hsdp":
        fully_shard(model, mesh=init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard")))
    elif layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return wrapped, Shampoo(wrapped.named_parameters(), model=wrapped, **options)
    return model, Shampoo(model.named_parameters(), **options)


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


Run = tuple[nn.Module, Shampoo]
FROZEN, IDLE = "up.weight", "down.weight"


def moved_twice(layout: str) -> dict[str, dict[str, Tensor]]:
    """Return parameters by case: uninterrupted runs, and runs whose state went out and in twice without a step.

    In between and in two steps after it, one parameter has no gradient; in half of the cases another one is frozen from
    before the first way out, which only FSDP2 allows in the middle of a run.
    """
    ways = WAYS if layout == "fsdp2" else {name: WAYS[name] for name in ("state_dict", "full", "file")}
    names, found = list(ways), {}
    with shared_folder() as folder:
        FOLDERS[:] = [folder]
        for frozen in ("", FROZEN) if layout == "fsdp2" else ("",):
            run = sharded(layout)
            steps(*run, range(SAVED), layout)
            module(run[0]).get_parameter(FROZEN).requires_grad_(not frozen)
            for number, first in enumerate(names):
                second = names[(number + bool(frozen)) % len(names)]
                moved = ways[second](ways[first](run, layout), layout)
                found[f"{first} {second} {frozen}".strip()] = continued(moved, layout)
            found[f"uninterrupted {frozen}".strip()] = continued(run, layout)
    return found


def continued(run: Run, layout: str) -> dict[str, Tensor]:
    model, optimizer = run
    parts = dist.get_world_size()
    for step in range(SAVED, STEPS):
        if step == SAVED + 2:
            model.requires_grad_(True)
        (piece,) = zoo.micro_batches(zoo.make_batch("wide", step), dist.get_rank() % parts, parts)
        optimizer.zero_grad()
        model(**piece).backward()
        if step < SAVED + 2:
            module(model).get_parameter(IDLE).grad = None
        optimizer.step()
    return {n.removeprefix("module."): full(p) for n, p in model.named_parameters()}


def module(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def target(run: Run, layout: str) -> Run:
    """Return a new run with the same weights, and the same frozen parameters."""
    again = sharded(layout, {n.removeprefix("module."): full(p) for n, p in run[0].named_parameters()})
    for own, other in zip(again[0].parameters(), run[0].parameters(), strict=True):
        own.requires_grad_(other.requires_grad)
    return again


def by_state_dict(run: Run, layout: str) -> Run:
    again = target(run, layout)
    if layout == "ddp":
        run[1].consolidate_state_dict()
        states = [run[1].state_dict() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(states, src=0)
        again[1].load_state_dict(states[0])  # type: ignore[arg-type]
    else:
        again[1].load_state_dict(run[1].state_dict())
    return again


def by_helpers(**given: Any) -> Callable[[Run, str], Run]:
    def move(run: Run, layout: str) -> Run:
        again, options = target(run, layout), StateDictOptions(**given)
        if layout == "ddp":
            run[1].consolidate_state_dict()
        state: Any = get_optimizer_state_dict(*run, options=options)
        loaded: Any = state or None  # as accelerate gives it
        set_optimizer_state_dict(*again, loaded, options=options)
        return again

    return move


def by_file(run: Run, layout: str) -> Run:
    again, folder = target(run, layout), FOLDERS[-1] / str(len(FOLDERS))
    FOLDERS.insert(0, folder)
    save_shampoo(run[1], folder)
    load_shampoo(again[1], folder)  # the next way, or the next step, reads it
    return again


# What `by_file` has written, and the folder that it writes to.
FOLDERS: list[Path] = []
WAYS: dict[str, Callable[[Run, str], Run]] = {
    "state_dict": by_state_dict,
    "nested": by_helpers(),
    "flat": by_helpers(flatten_optimizer_state_dict=True),
    "full": by_helpers(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True),
    "full_everywhere": by_helpers(full_state_dict=True),
    "file": by_file,
}


def zero_redundancy(_: None) -> list[str]:
    """Return the errors of ZeroRedundancyOptimizer with Shampoo inside."""
    errors = []
    model = nn.parallel.DistributedDataParallel(zoo.make_model("wide"))
    for options in ({}, {"model": model}, {"parameters_as_bucket_view": True}):
        with pytest.raises(LayoutError) as caught:
            ZeroRedundancyOptimizer(model.parameters(), Shampoo, lr=0.1, **options)
        errors.append(str(caught.value))
    return errors
