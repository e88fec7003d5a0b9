"""Shampoo: multiply each mode of a block by the inverse root of its factor matrix (arXiv 1802.09568, 2309.06497)."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_deepspeed.config import DTYPES, ShampooConfig
from shampoo_deepspeed.roots import inverse_root
from shampoo_deepspeed.verdict import Verdict


class ShampooPreconditioner:
    """Factor matrices A_i <- b2 A_i + (1 - b2) G_(i) G_(i)^T, applied as A_i^(-1/p) along mode i, p = 2k."""

    def __init__(self, config: ShampooConfig) -> None:
        self._beta2 = config.betas[1]
        self._bias_correction = config.use_bias_correction
        self._root = config.exponent_override
        self._epsilon = config.epsilon
        self._relative_epsilon = config.relative_epsilon
        self._solver = config.solver
        self._factor_dtype = DTYPES[config.factor_dtype]
        self._root_dtype = DTYPES[config.root_dtype]

    def new_state(self, count: int, shape: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """``factor_i`` and ``root_i`` [count, d_i, d_i] for each dim; roots mean nothing before the first refresh."""
        state = {}
        for mode, d in enumerate(shape):
            state[f"factor_{mode}"] = torch.zeros(count, d, d, dtype=self._factor_dtype, device=device)
            state[f"root_{mode}"] = torch.zeros(count, d, d, dtype=self._root_dtype, device=device)
        return state

    def accumulate(self, state: dict[str, Tensor], gradients: Tensor, verdict: Verdict) -> None:
        weight = 1.0 if self._beta2 == 1.0 else 1.0 - self._beta2
        for mode in range(gradients.ndim - 1):
            factor = state[f"factor_{mode}"]
            unfolded = unfold(gradients, mode).to(torch.promote_types(factor.dtype, gradients.dtype))
            if self._beta2 != 1.0:
                factor.mul_(verdict.keep(self._beta2))
            if factor.dtype == unfolded.dtype:
                factor.baddbmm_(unfolded, unfolded.mT, alpha=weight)
            else:
                factor.add_(torch.bmm(unfolded, unfolded.mT), alpha=weight)

    def refresh(self, state: dict[str, Tensor], step: int) -> list[int]:
        order = sum(name.startswith("factor_") for name in state)
        root = 2.0 * order if self._root is None else self._root
        corrected = self._bias_correction and self._beta2 < 1.0
        correction = 1.0 - self._beta2**step if corrected else 1.0
        computed, failed = [], set()
        for mode in range(order):
            matrices = state[f"factor_{mode}"]
            wide = matrices.to(torch.promote_types(matrices.dtype, torch.float32)) / correction
            roots, wrong = inverse_root(
                wide, root, self._epsilon, self._relative_epsilon, self._root_dtype, self._solver
            )
            computed.append(roots)
            failed.update(wrong)
        for mode, roots in enumerate(computed):
            for row in failed:
                roots[row] = state[f"root_{mode}"][row]
            state[f"root_{mode}"].copy_(roots)
        return sorted(failed)

    def apply(self, state: dict[str, Tensor], moments: Tensor) -> Tensor:
        wide = moments.to(torch.promote_types(moments.dtype, self._root_dtype))
        for mode in range(moments.ndim - 1):
            product = torch.bmm(state[f"root_{mode}"].to(wide.dtype), unfold(wide, mode))
            wide = fold(product, wide.shape, mode)
        return wide.to(moments.dtype)


def unfold(stack: Tensor, mode: int) -> Tensor:
    """Mode unfolding of each block: [B, d_0, ..., d_k-1] to [B, d_mode, product of the other dims]."""
    front = stack.movedim(mode + 1, 1)
    return front.reshape(front.shape[0], front.shape[1], -1)


def fold(unfolded: Tensor, shape: torch.Size, mode: int) -> Tensor:
    """Inverse of ``unfold`` for a stack of this full shape."""
    others = [n for dim, n in enumerate(shape[1:]) if dim != mode]
    return unfolded.reshape(shape[0], shape[mode + 1], *others).movedim(1, mode + 1)
