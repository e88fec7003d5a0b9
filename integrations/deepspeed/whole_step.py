"""One decision for a whole step of the engine, if that is several calls of the optimizer's ``step()``.

ZeRO-1 and ZeRO-2 step one parameter group after another, and the stages of a pipeline step their own parameters. A
gradient that is not finite must reject all of it. So the first call looks at the gradients of the groups that follow,
and asks all ranks. ZeRO-3 and the half-precision wrappers need none of this: DeepSpeed looks at all gradients before
it steps the first sub-group, and skips the engine's step. File names below are DeepSpeed's (0.19.8).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.runtime.devices import communication_device

if TYPE_CHECKING:
    from .engine import Engine


class WholeStep:
    """The decisions for one engine's steps.

    Args:
        engine: it must step all its tensors on every rank alike.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._number = -1
        self._called: set[int] = set()
        self._bad: Tensor | None = None

    def decide(self, tensor: int, bad: Tensor) -> Tensor:
        """Return whether the engine's step is rejected. A collective of all ranks at the first call in a step.

        Args:
            tensor: ``id`` of a tensor that is being stepped; the same one again belongs to the next step.
            bad: a number, not 0 if a gradient of this call is not finite.
        """
        engine = self._engine()
        assert engine is not None
        if self._bad is None or engine.global_steps != self._number or tensor in self._called:
            self._number, self._called = engine.global_steps, set()
            self._bad = _on_any_rank(torch.stack([bad, *_bad_later(engine, bad)]).amax())
        self._called.add(tensor)
        return torch.maximum(bad, self._bad.to(bad))


def needs_decision(engine: Engine) -> bool:
    """Whether a step of the engine is more than one call of ``step()``, and DeepSpeed itself does not decide for it."""
    if _steps_in_turn(engine):
        return bool(engine.pipeline_parallelism) or len(engine.optimizer.bit16_groups) > 1
    return bool(engine.pipeline_parallelism) and id(engine.optimizer) == id(engine.basic_optimizer)


def _steps_in_turn(engine: Engine) -> bool:
    """Whether this is the wrapper of ZeRO-1 and ZeRO-2; BF16_Optimizer may stand for it, and steps all at once."""
    return engine.zero_optimization_stage() in (1, 2) and hasattr(engine.optimizer, "averaged_gradients")


def _bad_later(engine: Engine, like: Tensor) -> Iterator[Tensor]:
    """Yield for each gradient that ZeRO-1 or ZeRO-2 still has to step whether it is not finite, as a number."""
    if not _steps_in_turn(engine):
        return
    offloaded = [partition.grad for partition in engine.optimizer.single_partition_of_fp32_groups]
    for gradients in (*engine.optimizer.averaged_gradients.values(), offloaded):
        for gradient in gradients or ():
            if gradient is not None and gradient.numel():
                yield (~torch.isfinite(torch.linalg.vector_norm(gradient.detach(), torch.inf))).to(like)


def _on_any_rank(flag: Tensor) -> Tensor:
    """Return the largest value of all ranks."""
    world = dist.group.WORLD
    moved = flag.to(communication_device(world, flag.device))
    dist.all_reduce(moved, dist.ReduceOp.MAX, group=world)
    return moved.to(flag.device)
