"""What a rank does if a run moves: trains the first half under one framework, the second half under another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn import functional as F

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.options.parameter_names import clean_name
from tests.support.moves import HALF, STEPS, Move, averaged
from tests.support.zoo import make_batch, make_model, micro_batches


@dataclass
class Training:
    """A model under a framework: functions for forward, for the step, and for whole parameters."""

    model: Any
    optimizer: Shampoo
    step: Callable[[Tensor], None]
    whole: Callable[[], dict[str, Tensor]]


def first_half(move: Move) -> None:
    """Train from the start, then save state and weights into the move's folder."""
    with framework(move, None) as training:
        train(training, range(HALF))
        save_shampoo(training.optimizer, Path(move.folder) / move.source)
        weights = training.whole()
    if rank() == 0:
        torch.save(weights, Path(move.folder) / f"{move.source}.pt")


def second_half(move: Move) -> dict[str, Tensor]:
    """Continue from what another framework has saved, and return the final parameters."""
    weights = torch.load(Path(move.folder) / f"{move.source}.pt", weights_only=True)
    with framework(move, weights) as training:
        load_shampoo(training.optimizer, Path(move.folder) / move.source)
        train(training, range(HALF, STEPS))
        with training.optimizer.averaged_weights():
            averages = averaged(training.whole())
        return training.whole() | averages


def train(training: Training, steps: range) -> None:
    for step in steps:
        (piece,) = micro_batches(make_batch("odd", step), rank(), dist.get_world_size() if dist.is_initialized() else 1)
        training.step(training.model(**piece))


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def framework(move: Move, weights: dict[str, Tensor] | None) -> Iterator[Training]:
    model = make_model("odd")
    if weights is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
    if move.target.startswith("zero"):
        with zero(move, model) as training:
            yield training
        return
    wrapped: Any = model
    if move.target.startswith("ddp"):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    elif move.target.startswith("fsdp1"):
        wrapped = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif move.target.startswith("fsdp2"):
        wrapped = fully_shard(model)
    elif move.target.startswith("hsdp"):
        mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
        wrapped = fully_shard(model, mesh=mesh)
    trained = [(n, p) for n, p in wrapped.named_parameters() if p.requires_grad]
    optimizer = Shampoo(trained, model=wrapped, **move.options)

    def step(loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def whole() -> dict[str, Tensor]:
        if isinstance(wrapped, FullyShardedDataParallel):
            with FullyShardedDataParallel.summon_full_params(wrapped):
                return {clean_name(n): p.detach().clone() for n, p in wrapped.named_parameters()}
        named = wrapped.named_parameters()
        return {clean_name(n): getattr(p, "full_tensor", lambda p=p: p)().detach().clone() for n, p in named}

    yield Training(wrapped, optimizer, step, whole)


@contextmanager
def zero(move: Move, model: nn.Module) -> Iterator[Training]:
    import deepspeed

    from tests.distributed.ranks import zero as runs  # it switches off kernels that DeepSpeed would compile

    optimizer = Shampoo([(n, p) for n, p in model.named_parameters() if p.requires_grad], **move.options)
    linear = F.linear
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_micro_batch_size_per_gpu": 16 // dist.get_world_size(),
            "gradient_clipping": 0.0,
            "steps_per_print": 10_000,
            "zero_optimization": {"stage": int(move.target[4])},
        },
    )

    def step(loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    try:
        yield Training(engine, optimizer, step, lambda: runs.full_parameters(engine))
    finally:
        engine.destroy()
        F.linear = linear
