"""What a rank does in the checks of replicas: unequal gradients and uneven inputs, with the work divided or not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.local_sgd import LocalSGD
from accelerate.state import AcceleratorState, DistributedType
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.join import Join
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from shampoo_deepspeed import LayoutError, Shampoo
from shampoo_deepspeed.integrations.accelerate import prepare
from tests.distributed.ranks.trainer import clean_process
from tests.support.zoo import make_batch, make_model, micro_batches

OPTIONS: dict[str, Any] = {"lr": 1e-2, "precondition_frequency": 2, "max_preconditioner_dim": 16}


def unequal(case: str) -> tuple[str, int, bool]:
    """Return the error of steps with unequal gradients, at which step it came, and whether that changed weights."""
    with clean_process():
        model: Any = make_model("wide")
        step, optimizer, context = LOCAL[case](model)
        with context:
            for number in range(4):
                before = [local(p).clone() for p in model.parameters()]
                try:
                    step(number)
                except LayoutError as error:
                    same = all(torch.equal(a, local(p)) for a, p in zip(before, model.parameters(), strict=True))
                    return str(error), number, not same
                optimizer.zero_grad()
        return "", 4, False


def local(parameter: Any) -> Tensor:
    found: Tensor = parameter.to_local() if hasattr(parameter, "to_local") else parameter
    return found.detach()


def own_loss(model: nn.Module, step: int, kind: str = "wide") -> Tensor:
    """Return the loss of this rank's part of a step's batch."""
    (piece,) = micro_batches(make_batch(kind, step), dist.get_rank(), dist.get_world_size())
    loss: Tensor = model(**piece)
    return loss


Stepper = tuple[Callable[[int], None], Any, Any]


def no_sync(model: nn.Module) -> Stepper:
    """DDP, two steps with synchronized gradients, then two without."""
    ddp = DistributedDataParallel(model)
    optimizer = Shampoo(ddp.named_parameters(), model=ddp, **OPTIONS)

    def step(number: int) -> None:
        with ddp.no_sync() if number >= 2 else nullcontext():
            own_loss(ddp, number).backward()
        optimizer.step()

    return step, optimizer, nullcontext()


def local_sgd(model: nn.Module) -> Stepper:
    accelerator = Accelerator(cpu=True)
    ddp, optimizer = prepare(accelerator, model, Shampoo(model.named_parameters(), model=model, **OPTIONS))
    averaging = LocalSGD(accelerator, ddp, local_sgd_steps=2)

    def step(number: int) -> None:
        accelerator.backward(own_loss(ddp, number))
        optimizer.step()
        averaging.step()

    return step, optimizer, averaging


def averaged(steps: int) -> dict[str, Any]:
    """Train by accelerate's LocalSGD with a Shampoo that does all of the work; return weights before and after a mean.

    Each rank's weights are its own until accelerate averages them, every second step.
    """
    with clean_process():
        accelerator = Accelerator(cpu=True)
        model: Any = make_model("wide")
        ddp, optimizer = accelerator.prepare(model, Shampoo(model.parameters(), **OPTIONS))
        apart = []
        losses = []
        with LocalSGD(accelerator, ddp, local_sgd_steps=2) as averaging:
            for _ in range(steps):
                loss = own_loss(ddp, 0)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                apart.append(model.up.weight.detach().clone())
                averaging.step()
                losses.append(loss.item())
        return {
            "apart": apart,
            "weights": {n: p.detach().clone() for n, p in model.named_parameters()},
            "losses": losses,
        }


def post_local_sgd(model: nn.Module) -> Stepper:
    """torch's own local SGD: DDP's gradients are averaged in the first two steps only."""
    ddp = DistributedDataParallel(model)
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    alone = groups[dist.get_rank()]
    ddp.register_comm_hook(PostLocalSGDState(None, alone, start_localSGD_iter=2), post_localSGD_hook)
    inner = Shampoo(ddp.named_parameters(), model=ddp, **OPTIONS)
    optimizer: Any = PostLocalSGDOptimizer(inner, PeriodicModelAverager(period=2, warmup_steps=2))

    def step(number: int) -> None:
        own_loss(ddp, number).backward()
        optimizer.step()

    return step, optimizer, nullcontext()


def never_reduced(model: nn.Module) -> Stepper:
    """A loop that names the ranks but forgets the all-reduce, with one parameter group per kind of parameter."""
    named = list(model.named_parameters())
    groups = [{"params": [n for n in named if n[1].ndim == ndim]} for ndim in (1, 2)]
    optimizer = Shampoo(groups, process_group=dist.group.WORLD, **OPTIONS)

    def step(number: int) -> None:
        own_loss(model, number).backward()
        optimizer.step()

    return step, optimizer, nullcontext()


def other_batches(model: Any) -> Stepper:
    """Tensor parallelism whose ranks get different batches."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer = Shampoo(model.named_parameters(), model=model, **OPTIONS)

    def step(number: int) -> None:
        own_loss(model, number).backward()
        optimizer.step()

    return step, optimizer, nullcontext()


def unwrapped_root(model: Any) -> Stepper:
    """FSDP2 on two layers only: the gradients of the other parameters are never averaged."""
    for layer in (model.up, model.down):
        fully_shard(layer)
    optimizer = Shampoo(model.named_parameters(), model=model, **OPTIONS)

    def step(number: int) -> None:
        own_loss(model, number).backward()
        optimizer.step()

    return step, optimizer, nullcontext()


LOCAL: dict[str, Callable[[Any], Stepper]] = {
    function.__name__: function
    for function in (no_sync, local_sgd, post_local_sgd, never_reduced, other_batches, unwrapped_root)
}


def joined(case: str) -> dict[str, Any]:
    """Train with one batch more on each rank than on the one before, within join(); return the error or the weights."""
    with clean_process():
        model = make_model("wide")
        ddp: Any
        optimizer: Any
        if case == "accelerate":
            accelerator = Accelerator(cpu=True)
            ddp, optimizer = prepare(accelerator, model, Shampoo(model.named_parameters(), model=model, **OPTIONS))
            AcceleratorState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate joins no CPUs
            context: Any = accelerator.join_uneven_inputs([ddp], even_batches=False)
        else:
            ranks = dist.group.WORLD if case == "wrapped_later" else None
            if ranks is not None or case == "undivided":
                optimizer = Shampoo(model.named_parameters(), model=model, process_group=ranks, **OPTIONS)
            ddp = DistributedDataParallel(model)
            if ranks is None and case != "undivided":
                optimizer = Shampoo(ddp.named_parameters(), model=ddp, **OPTIONS)
            if case == "later":  # the work has been divided before
                own_loss(ddp, 9).backward()
                optimizer.step()
            try:
                context = Join([ddp, optimizer] if case == "both" else [ddp])
            except LayoutError as error:
                return {"error": str(error), "steps": 0}
        steps = 0
        try:
            with context:
                for number in range(2 + dist.get_rank()):
                    optimizer.zero_grad()
                    own_loss(ddp, number).backward()
                    optimizer.step()
                    steps += 1
        except LayoutError as error:
            return {"error": str(error), "steps": steps}
        return {"error": "", "steps": steps, "weights": {n: p.detach().clone() for n, p in model.named_parameters()}}
