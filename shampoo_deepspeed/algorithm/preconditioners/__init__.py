"""Preconditioners: one small class each, all with the interface of `Preconditioner`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.preconditioners.shampoo import KLShampooPreconditioner, ShampooPreconditioner
from shampoo_deepspeed.algorithm.preconditioners.soap import SOAPPreconditioner
from shampoo_deepspeed.options.config import ShampooConfig


class Preconditioner(Protocol):
    """The mathematics of a stack of equal blocks. It is stateless: each method gets all state in a dict.

    ``state`` maps names to tensors with the block as first dim; methods change them in place.

    Attributes:
        first_moment: the name under which ``state`` holds the first moments, if there are any; the step of a stack
            updates them.
        filled_by_refresh: the name of a tensor [B, *shape] that the first refresh overwrites.
        rotates_moments: whether first moments are kept in the preconditioner's own coordinates. If not,
            ``project``, ``follow_basis`` and ``project_back`` do nothing.
    """

    first_moment: str
    filled_by_refresh: str | None
    rotates_moments: bool

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """State of ``count`` blocks that have not seen a gradient; ``dtype`` is that of moments and updates."""
        ...

    def accumulate(self, state: dict[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        """Add the gradients [B, *shape] of a step to the statistics, if it is one whose gradients they take."""
        ...

    def compute(self, state: dict[str, Tensor], step: int, conditions: list[Tensor]) -> RefreshResult:
        """Compute a refresh, its expensive part: reads factor matrices and bases, and changes nothing."""
        ...

    def install(self, state: dict[str, Tensor], result: RefreshResult) -> list[int]:
        """Install a computed refresh; returns the rows that failed, which stay as they were."""
        ...

    def project(self, state: dict[str, Tensor], gradients: Tensor) -> Tensor:
        """Gradients in the first moment's coordinates; called from a block's first refresh on."""
        ...

    def follow_basis(self, state: dict[str, Tensor], result: RefreshResult, moments: Tensor) -> None:
        """Complete a refresh, given the corrected first moments [B, *shape] of its step."""
        ...

    def apply(self, state: dict[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None) -> Tensor:
        """The preconditioned update of first moments [B, *shape], linear in them, as a new tensor.

        ``entered`` are the gradients from ``project``. Called once in each step of blocks that have been refreshed.
        """
        ...

    def project_back(self, state: dict[str, Tensor], moments: Tensor) -> Tensor:
        """First moments in the gradients' coordinates; undoes ``project``."""
        ...


_CLASSES: dict[str, Callable[[ShampooConfig], Preconditioner]] = {
    "shampoo": ShampooPreconditioner,
    "soap": SOAPPreconditioner,
    "kl_shampoo": KLShampooPreconditioner,
}


def build(config: ShampooConfig) -> Preconditioner:
    """The preconditioner that the options ask for."""
    return _CLASSES[config.preconditioner](config)
