"""What a preconditioner is: the interface of all, and what those without statistics of their own do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.options.config import ShampooConfig


class Preconditioner:
    """The mathematics of a stack of equal blocks. It is stateless: each method gets all state in a dict.

    ``state`` maps names to tensors with the block as first dim; methods change them in place. Blocks refresh if there
    are factor matrices, tensors named ``factor_<mode>``; without any they are preconditioned from the first step on.
    A subclass needs ``apply``. The other methods here keep no state and change nothing.

    Attributes:
        first_moment: the name under which ``state`` holds the first moments, if there are any; the step of a stack
            updates them.
        filled_by_refresh: the name of a tensor [B, *shape] that the first refresh overwrites.
        rotates_moments: whether first moments are kept in the preconditioner's own coordinates. If not,
            ``project``, ``follow_basis`` and ``project_back`` do nothing.
        own_length: whether updates have a length of their own. If not, they are as long as moments are, so that
            ``apply`` is linear in them.
        reads: whether later refreshes read the device, so that there is no ``compute_unread``.
    """

    first_moment = "exp_avg"
    filled_by_refresh: str | None = None
    rotates_moments = False
    own_length = False
    reads = True

    def __init__(self, config: ShampooConfig) -> None:
        self._config = config

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """State of ``count`` blocks that have not seen a gradient; ``dtype`` is that of moments and updates."""
        return {}

    def accumulate(self, state: Mapping[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        """Add the gradients [B, *shape] of a step to the statistics, if it is one whose gradients they take."""

    def compute(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor]) -> RefreshResult:
        """Compute a refresh, its expensive part: reads factor matrices and bases, and changes nothing."""
        return RefreshResult({}, frozenset())

    def compute_unread(self, state: Mapping[str, Tensor], step: int, conditions: list[Tensor] | None) -> RefreshResult:
        """``compute`` on an accelerator, without a read, for blocks that have been refreshed before.

        What fails is not tried another way. ``conditions`` is None if nobody asks for them.
        """
        raise NotImplementedError

    def install(self, state: Mapping[str, Tensor], result: RefreshResult) -> list[int]:
        """Install a computed refresh; returns the rows that failed, which stay as they were."""
        return sorted(result.failed)

    def project(self, state: Mapping[str, Tensor], gradients: Tensor) -> Tensor:
        """Gradients in the first moment's coordinates; called from a block's first refresh on."""
        return gradients

    def follow_basis(self, state: Mapping[str, Tensor], result: RefreshResult, moments: Tensor) -> None:
        """Complete a refresh, given the corrected first moments [B, *shape] of its step."""

    def apply(
        self, state: Mapping[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None
    ) -> Tensor:
        """The preconditioned update of first moments [B, *shape], as a new tensor.

        ``entered`` are the gradients from ``project``. Called once in each step of blocks that have been refreshed.
        """
        raise NotImplementedError

    def project_back(self, state: Mapping[str, Tensor], moments: Tensor) -> Tensor:
        """First moments in the gradients' coordinates; undoes ``project``."""
        return moments

    def squares_so_far(
        self, state: Mapping[str, Tensor], shape: tuple[int, ...], steps: Sequence[int]
    ) -> list[tuple[Tensor, float]]:
        """The running mean of ||G||^2 of blocks [B, *shape] that had so many steps: float64 numbers and their factors.

        Blocks with 0 steps do not count. Without factor matrices first moments show it, if there are any.
        """
        if self.first_moment not in state:
            return []
        beta1, moments = self._config.betas[0], state[self.first_moment]
        factors = [grafting.noise_in_first_moment(beta1, step) if step else 0.0 for step in steps]
        norms = torch.linalg.vector_norm(moments.flatten(1), dim=1, dtype=torch.float64)
        return [*zip(norms.square().unbind(), factors, strict=True)]
