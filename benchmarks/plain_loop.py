"""Shampoo without batching: an optimizer that loops over blocks one by one, and refreshes all of them in one step.

It represents implementations that loop over their blocks, as the reference Distributed Shampoo does. It computes what
`shampoo_deepspeed.Shampoo` computes with `refresh="sync"`, `solver="eigh"` and Adam's grafting; a test checks this. It
reads nothing back to the CPU and makes no copy that the algorithm does not need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Block:
    """State of one block of a parameter; a block without factors is element-wise."""

    box: tuple[Any, ...]  # slices, or (...,) for the whole parameter
    first: Tensor
    second: Tensor
    factors: list[Tensor]
    roots: list[Tensor] = field(default_factory=list)


class PlainLoop(torch.optim.Optimizer):
    """Shampoo, one block after another: eigendecompositions every ``frequency`` steps, and updates of Adam's norm.

    Param groups with ``elementwise=True``, and parameters that are not matrices, get Adam's update.

    Args:
        weight_decay: decoupled weight decay.
        epsilon, relative_epsilon: absolute and relative ridge of the factor matrices.
        block: largest side of a block.
        frequency: steps between refreshes; the first refresh is at this step.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        epsilon: float = 1e-12,
        relative_epsilon: float = 1e-6,
        block: int = 1024,
        frequency: int = 10,
        elementwise: bool = False,
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"epsilon": epsilon, "relative_epsilon": relative_epsilon}
        super().__init__(params, defaults | {"block": block, "frequency": frequency, "elementwise": elementwise})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step_parameter(p, group)
        return loss

    def _step_parameter(self, p: Tensor, group: dict[str, Any]) -> None:
        assert p.grad is not None
        state = self.state[p]
        if not state:
            state["step"] = 0
            state["blocks"] = [new_block(p, box) for box in boxes(p, group)]
        state["step"] += 1
        for block in state["blocks"]:
            weights = p[block.box]
            step = update(block, p.grad[block.box], state["step"], group)
            if group["weight_decay"]:
                step = step.add_(weights, alpha=group["weight_decay"])
            weights.add_(step, alpha=-group["lr"])


def boxes(p: Tensor, group: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Return boxes of a matrix, at most ``block`` along each side, as slices; for other tensors one box for all."""
    if group["elementwise"] or p.ndim != 2:
        return [(...,)]
    size = group["block"]
    rows, columns = ([slice(n, min(n + size, d)) for n in range(0, d, size)] for d in p.shape)
    return [(row, column) for row in rows for column in columns]


def new_block(p: Tensor, box: tuple[Any, ...]) -> Block:
    piece = p[box]
    sides = [] if box == (...,) else piece.shape
    zero = torch.zeros_like(piece, memory_format=torch.contiguous_format)
    return Block(box, zero, zero.clone(), [piece.new_zeros(d, d) for d in sides])


def update(block: Block, g: Tensor, t: int, group: dict[str, Any]) -> Tensor:
    """Return the update as a new tensor: Adam's or, after the first refresh, Shampoo's with the norm of Adam's."""
    (beta1, beta2), (lack1, lack2) = group["betas"], (1.0 - beta**t for beta in group["betas"])
    for mode, a in enumerate(block.factors):
        x = g if mode == 0 else g.mT
        a.addmm_(x, x.mT, beta=beta2, alpha=1.0 - beta2)
    if t % group["frequency"] == 0:
        ridge = group["epsilon"], group["relative_epsilon"]
        block.roots = [inverse_fourth_root(a / lack2, *ridge) for a in block.factors]
    block.first.mul_(beta1).add_(g, alpha=1.0 - beta1)
    block.second.mul_(beta2).addcmul_(g, g, value=1.0 - beta2)
    moment = block.first / lack1
    adam = moment / (block.second / lack2).sqrt_().add_(group["eps"])
    if not block.roots:
        return adam
    left, right = block.roots
    found = left @ moment @ right
    length = torch.linalg.vector_norm(found)
    return found.mul_(torch.where(length > 0, torch.linalg.vector_norm(adam) / length, 0.0))


def inverse_fourth_root(a: Tensor, epsilon: float, relative_epsilon: float) -> Tensor:
    """A^(-1/4) with eigenvalues ``l - min(l_min, 0) + max(epsilon, relative_epsilon * l_max)``; for 0 the root is 0."""
    values, vectors = torch.linalg.eigh(a)
    values = values - values[0].clamp_max(0.0) + (relative_epsilon * values[-1]).clamp_min(epsilon)
    powers = torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny).pow(-0.25), 0.0)
    return (vectors * powers) @ vectors.mT
