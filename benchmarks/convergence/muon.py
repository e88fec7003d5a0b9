"""Muon with products in float32, as a reference: torch's are in bfloat16, which costs it loss and most CPUs time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrix: Tensor, iterations: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The matrix with all singular values near 1, by Keller Jordan's quintic Newton-Schulz iteration in a dtype."""
    a, b, c = COEFFICIENTS
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = (x / (x.norm() + 1e-7)).to(dtype)
    for _ in range(iterations):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized, with an update of root mean square `scale`, as AdamW's (2502.16982).

    The three parts of a fused query, key and value matrix are orthogonalized one by one.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        scale: float = 0.2,
        iterations: int = 5,
        dtype: str = "float32",
    ) -> None:
        pairs = list(named)
        self.fused = {id(p) for name, p in pairs if "c_attn" in name}
        self.scale, self.iterations, self.dtype = scale, iterations, getattr(torch, dtype)
        super().__init__([p for _, p in pairs], {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                average = self.state[p].setdefault("momentum", torch.zeros_like(p))
                average.lerp_(p.grad, 1 - group["momentum"])
                direction = p.grad.lerp(average, group["momentum"])
                parts = direction.chunk(3, dim=1) if id(p) in self.fused else (direction,)
                flat = [orthogonalized(d, self.iterations, self.dtype) * max(d.shape) ** 0.5 for d in parts]
                update = torch.cat(flat, dim=1)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(update, alpha=group["lr"] * self.scale)
