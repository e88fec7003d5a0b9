"""A rank's blocks of one shape and group as stacked tensors, and their step: gradient in, direction out."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed import grafting
from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.preconditioners import build
from shampoo_deepspeed.verdict import Verdict

logger = logging.getLogger(__name__)


class BlockStack:
    """State and step of B equal blocks, one row each.

    Args:
        keys: block keys, ``"parameter/index"``, in row order.
        shape: the blocks' shape.
        config: options at the time of building; later changes of betas and the like are honoured by ``step``.
        dtype: dtype of moments and directions, float32 or float64.
    """

    def __init__(
        self,
        keys: Sequence[str],
        shape: tuple[int, ...],
        config: ShampooConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.keys = tuple(keys)
        self.shape = shape
        count = len(self.keys)
        self.tensors = build(config).new_state(count, shape, device)
        if config.betas[0] != 0.0:
            self.tensors["exp_avg"] = torch.zeros(count, *shape, dtype=dtype, device=device)
        if grafting.has_second_moment(warm_method(config)):
            self.tensors["second_moment"] = torch.zeros(count, *shape, dtype=dtype, device=device)
        # Host-side counters: all ranks and the device agree on them without a read.
        self.steps = [0] * count
        self.refreshed = [False] * count
        self.failures = [0] * count

    def step(
        self, first: int, gradients: Tensor, active: Sequence[bool] | None, config: ShampooConfig, verdict: Verdict
    ) -> Tensor:
        """Directions of the rows from ``first`` on, given their gradients [n, *shape]; counts their steps.

        Args:
            active: which of these rows take part; the others get direction 0 and keep their state. None: all.
        """
        cohorts: dict[tuple[int, bool], list[int]] = defaultdict(list)
        for row in range(len(gradients)):
            if active is None or active[row]:
                self.steps[first + row] += 1
                cohorts[(self.steps[first + row], self.refreshed[first + row])].append(row)
        if len(cohorts) == 1 and len(next(iter(cohorts.values()))) == len(gradients):
            ((step, _),) = cohorts
            state = {name: t[first : first + len(gradients)] for name, t in self.tensors.items()}
            return self._advance(state, range(first, first + len(gradients)), gradients, step, config, verdict)
        directions = torch.zeros_like(gradients)
        for (step, _), rows in cohorts.items():
            index = torch.tensor(rows, device=gradients.device)
            at = index + first
            state = {name: t.index_select(0, at) for name, t in self.tensors.items()}
            chosen = gradients.index_select(0, index)
            made = self._advance(state, [first + row for row in rows], chosen, step, config, verdict)
            directions.index_copy_(0, index, made)
            for name, tensor in self.tensors.items():
                tensor.index_copy_(0, at, state[name])
        return directions

    def _advance(
        self,
        state: dict[str, Tensor],
        rows: Sequence[int],
        gradients: Tensor,
        step: int,
        config: ShampooConfig,
        verdict: Verdict,
    ) -> Tensor:
        """Steps 2 to 6 of the rule for rows that share a step count (and whether they were ever refreshed)."""
        preconditioner = build(config)
        preconditioner.accumulate(state, gradients, verdict)
        # A refresh waits for the device anyway, so here the host may as well read the verdict.
        if config.refreshes_at(step) and not verdict.rejected:
            self._note_refresh(rows, set(preconditioner.refresh(state, step)))
        moments, graft = self._moments(state, gradients, step, config, verdict)
        ready = [self.refreshed[row] for row in rows]
        if not any(ready):
            return graft()
        direction = preconditioner.apply(state, moments)
        if config.grafting != "none":
            warm = graft()
            direction = direction * _ratio(block_norms(warm), block_norms(direction))
        if all(ready):
            return direction
        mask = torch.tensor(ready, device=direction.device).view(-1, *[1] * len(self.shape))
        return torch.where(mask, direction, graft())

    def _moments(
        self, state: dict[str, Tensor], gradients: Tensor, step: int, config: ShampooConfig, verdict: Verdict
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        """Steps 4 and 5: update both moments; gives M, and what computes the grafting direction."""
        method, beta2 = warm_method(config), config.second_moment_beta
        second = [state["second_moment"]] if "second_moment" in state else []
        own = gradients
        if second and grafting.is_normalized(method):
            own = grafting.normalized(gradients, block_norms(gradients))
        grafting.accumulate(method, second, [own], beta2, verdict)
        first = [state["exp_avg"]] if "exp_avg" in state else []
        beta1 = config.betas[0] if first else 0.0
        moments = grafting.first_moment(first, [gradients], beta1, step, config.use_bias_correction, verdict)
        return moments[0], lambda: grafting.direction(method, moments, second, step, beta2, config.eps)[0]

    def _note_refresh(self, rows: Sequence[int], failed: set[int]) -> None:
        for position, row in enumerate(rows):
            if position not in failed:
                self.refreshed[row] = True
                self.failures[row] = 0
                continue
            self.failures[row] += 1
            logger.warning(
                "no inverse root of block %s: its eigendecomposition failed %d times in a row, last good one kept",
                self.keys[row],
                self.failures[row],
            )

    def take_back(self, active: Sequence[bool] | None) -> None:
        """Undo the count of a step that turned out to be rejected."""
        for row in range(len(self.keys)):
            if active is None or active[row]:
                self.steps[row] -= 1

    def export(self) -> dict[str, Any]:
        """State as tensors and builtins; tensors are the live ones."""
        return {
            "keys": list(self.keys),
            "shape": list(self.shape),
            "steps": list(self.steps),
            "refreshed": list(self.refreshed),
            "failures": list(self.failures),
            "tensors": dict(self.tensors),
        }

    def load_row(self, row: int, saved: dict[str, Any], saved_row: int) -> None:
        """Take one block's state from an exported stack that holds it at ``saved_row``.

        Raises:
            ValueError: where the saved block has another shape or other state than the options now ask for.
        """
        if tuple(saved["shape"]) != self.shape or set(saved["tensors"]) != set(self.tensors):
            raise ValueError(
                f"saved state of block {self.keys[row]} has shape {tuple(saved['shape'])} "
                f"and {sorted(saved['tensors'])}; "
                f"the options now ask for {self.shape} and {sorted(self.tensors)} "
                "(max_preconditioner_dim, betas or grafting changed)"
            )
        for name, tensor in self.tensors.items():
            tensor[row].copy_(saved["tensors"][name][saved_row])
        self.steps[row] = int(saved["steps"][saved_row])
        self.refreshed[row] = bool(saved["refreshed"][saved_row])
        self.failures[row] = int(saved["failures"][saved_row])


def warm_method(config: ShampooConfig) -> str:
    """The method of directions before a block's first refresh, and of its step length after it where grafted."""
    return config.elementwise_method if config.grafting == "none" else config.grafting


def block_norms(stack: Tensor) -> Tensor:
    """Frobenius norm of each block of [B, *shape], as [B, 1, ..., 1]."""
    return torch.linalg.vector_norm(stack, dim=tuple(range(1, stack.ndim)), keepdim=True)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    return torch.where(denominator > 0, numerator / denominator, 0.0)
