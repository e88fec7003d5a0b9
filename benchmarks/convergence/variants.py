"""Rules around a step that were tried, for the table of what was measured: none of them is an option of the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("cautious_decay", "hyperball", "update_clipping")


class Around:
    """A step of an optimizer, and what is changed after it in matrices that are neither embedding nor head.

    Args:
        optimizer: its groups give rates and weight decay.
        matrices: the parameters that are changed.
        cautious_decay: decay only elements that the update moves towards zero (2510.12402). The optimizer must not
            decay them itself.
        hyperball: keep each matrix at the Frobenius norm that it began with (2606.16899).
        update_clipping: the largest root mean square of a matrix's change, in units of the rate.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        matrices: list[nn.Parameter],
        weight_decay: float,
        cautious_decay: bool = False,
        hyperball: bool = False,
        update_clipping: float | None = None,
    ) -> None:
        self.optimizer, self.matrices, self.weight_decay = optimizer, matrices, weight_decay
        self.cautious_decay, self.update_clipping = cautious_decay, update_clipping
        self.norms = [p.detach().norm() for p in matrices] if hyperball else None

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    @torch.no_grad()
    def step(self) -> None:
        """Step, then change what the step did to the matrices."""
        before = [p.clone() for p in self.matrices]
        self.optimizer.step()
        lr = self.param_groups[0]["lr"]
        for number, (p, old) in enumerate(zip(self.matrices, before, strict=True)):
            change = p - old
            if self.update_clipping is not None:
                change *= (self.update_clipping * lr / rms(change)).clamp(max=1.0)
            if self.cautious_decay:
                change -= lr * self.weight_decay * old * (change * old < 0)
            p.copy_(old + change)
            if self.norms is not None:
                p.mul_(self.norms[number] / p.norm())


def rms(tensor: Tensor) -> Tensor:
    return tensor.square().mean().sqrt() + 1e-30
