"""Shampoo: multiply each mode of a block by the inverse root of its factor matrix (arXiv 1802.09568, 2309.06497)."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_deepspeed.config import DTYPES, ShampooConfig
from shampoo_deepspeed.roots import diagonal_root, inverse_root
from shampoo_deepspeed.verdict import Verdict


class ShampooPreconditioner:
    """Factor matrices A_i <- b2 A_i + (1 - b2) G_(i) G_(i)^T, applied as A_i^(-1/p) along mode i.

    p is twice the number of modes that have a factor at all. A mode may have the diagonal of its factor only, or
    nothing (``ShampooConfig.sides``), which then is neither kept nor computed.
    """

    def __init__(self, config: ShampooConfig) -> None:
        self._config = config
        self._beta2 = config.betas[1]
        self._bias_correction = config.use_bias_correction
        self._factor_dtype = DTYPES[config.factor_dtype]
        self._root_dtype = DTYPES[config.root_dtype]

    def new_state(self, count: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """``factor_i`` and ``root_i`` for each dim that has them, [count, d_i, d_i], or [count, d_i] of a diagonal.

        Roots mean nothing before the first refresh.
        """
        state = {}
        for mode, (d, side) in enumerate(zip(shape, self._config.sides(shape), strict=True)):
            if side != "none":
                size = (count, d, d) if side == "matrix" else (count, d)
                state[f"factor_{mode}"] = torch.zeros(size, dtype=self._factor_dtype, device=device)
                state[f"root_{mode}"] = torch.zeros(size, dtype=self._root_dtype, device=device)
        return state

    def accumulate(self, state: dict[str, Tensor], gradients: Tensor, verdict: Verdict) -> None:
        weight = 1.0 if self._beta2 == 1.0 else 1.0 - self._beta2
        for mode in modes_of(state):
            factor = state[f"factor_{mode}"]
            unfolded = unfold(gradients, mode).to(torch.promote_types(factor.dtype, gradients.dtype))
            if self._beta2 != 1.0:
                factor.mul_(verdict.keep(self._beta2))
            if factor.ndim == 2:
                factor.add_(unfolded.square().sum(dim=-1), alpha=weight)
            elif factor.dtype == unfolded.dtype:
                factor.baddbmm_(unfolded, unfolded.mT, alpha=weight)
            else:
                factor.add_(torch.bmm(unfolded, unfolded.mT), alpha=weight)

    def refresh(self, state: dict[str, Tensor], step: int) -> list[int]:
        modes = modes_of(state)
        corrected = self._bias_correction and self._beta2 < 1.0
        correction = 1.0 - self._beta2**step if corrected else 1.0
        computed, failed = {}, set()
        for mode in modes:
            matrices = state[f"factor_{mode}"]
            wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32)) / correction
            computed[mode], wrong = self._roots(wide, self._config.root(len(modes)))
            failed.update(wrong)
        for mode, roots in computed.items():
            for row in failed:
                roots[row] = state[f"root_{mode}"][row]
            state[f"root_{mode}"].copy_(roots)
        return sorted(failed)

    def _roots(self, factors: Tensor, root: float) -> tuple[Tensor, list[int]]:
        config = self._config
        ridge, pseudo = (config.epsilon, config.relative_epsilon), config.rank_deficient == "pseudo_inverse"
        if factors.ndim == 2:
            return diagonal_root(factors, root, *ridge, self._root_dtype, pseudo)
        return inverse_root(factors, root, *ridge, self._root_dtype, config.solver, pseudo)

    def apply(self, state: dict[str, Tensor], moments: Tensor) -> Tensor:
        wide = moments.to(torch.promote_types(moments.dtype, self._root_dtype))
        for mode in modes_of(state):
            wide = multiply(wide, state[f"root_{mode}"].to(wide.dtype), mode)
        return wide.to(moments.dtype)


def modes_of(state: dict[str, Tensor]) -> list[int]:
    """The modes that have a factor, in order."""
    return sorted(int(name.removeprefix("factor_")) for name in state if name.startswith("factor_"))


def multiply(stack: Tensor, factors: Tensor, mode: int) -> Tensor:
    """Multiply matrices [B, d, d], or diagonals [B, d], into one mode of each block of a stack [B, ...]."""
    if factors.ndim == 2:
        shape = [len(stack), *(n if dim == mode else 1 for dim, n in enumerate(stack.shape[1:]))]
        return stack * factors.view(shape)
    return fold(torch.bmm(factors, unfold(stack, mode)), stack.shape, mode)


def unfold(stack: Tensor, mode: int) -> Tensor:
    """Mode unfolding of each block: [B, d_0, ..., d_k-1] to [B, d_mode, product of the other dims]."""
    front = stack.movedim(mode + 1, 1)
    return front.reshape(front.shape[0], front.shape[1], -1)


def fold(unfolded: Tensor, shape: torch.Size, mode: int) -> Tensor:
    """Inverse of ``unfold`` for a stack of this full shape."""
    others = [n for dim, n in enumerate(shape[1:]) if dim != mode]
    return unfolded.reshape(shape[0], shape[mode + 1], *others).movedim(1, mode + 1)
