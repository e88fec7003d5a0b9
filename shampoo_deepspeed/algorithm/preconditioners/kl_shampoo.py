"""KL-Shampoo: Shampoo whose factor matrices minimise a Kullback-Leibler divergence (arXiv 2509.03378)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.preconditioners.shampoo import ShampooPreconditioner, modes_of
from shampoo_deepspeed.linalg.mode_products import multiply
from shampoo_deepspeed.linalg.precision import power
from shampoo_deepspeed.options.config import ShampooConfig


class KLShampooPreconditioner(ShampooPreconditioner):
    r"""Factors S_i <- b S_i + (1 - b) X_(i) X_(i)^T / n_i, applied as S_i^(-1/2) along every mode.

    X is G multiplied along every *other* mode j by S_j^(-1/2), and n_i the product of the other dims. Derivation:
    the gradient g = vec(G) has second moment E[gg'], to be fitted by S = S_1 (x) ... (x) S_k. Up to a constant,

        2 KL(N(0, E[gg']) || N(0, S)) = sum_i n_i log det S_i + E[g' S^-1 g],

    and the derivative by S_i^-1 vanishes at S_i = E[X_(i) X_(i)'] / n_i (for a matrix: S_a = E[G S_b^-1 G'] / d_b,
    claim 2 of the paper). The preconditioner is S^(-1/2), so every mode gets the root 2 for any order.

    S determines its factors only up to scalars whose product is 1. Here every S_j is scaled to mean eigenvalue 1 when
    another factor is computed from it. So all factors have the scale of the squared gradient from the first step on,
    and statistics from before and after a refresh have equal weights. Gradients of another scale give the same updates.
    At the minimum the mean eigenvalues of all factors are then equal, and S is that mean times the product of the
    scaled factors. While they differ, their geometric mean takes its place.

    Before the first refresh the other factors count as identities, and after it as they were at the last refresh.
    """

    def __init__(self, config: ShampooConfig) -> None:
        super().__init__(config)
        self._in_float64 = config.decomposes_in_float64

    def new_state(
        self, count: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype
    ) -> dict[str, Tensor]:
        """As for Shampoo, but ``root_i`` is that of the factor scaled to mean eigenvalue 1, and begins as the identity.

        ``scale`` [count] is the factor that the product of the roots lacks.
        """
        state = super().new_state(count, shape, device, dtype)
        for mode in modes_of(state):
            state[f"root_{mode}"].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return {**state, "scale": torch.ones(count, dtype=dtype, device=device)}

    def accumulate(self, state: dict[str, Tensor], gradients: Tensor, step: int, found_inf: FoundInf | None) -> None:
        whole = gradients.to(torch.promote_types(gradients.dtype, self._root_dtype))
        parts = []
        for mode, count in self._due(state, step):
            whitened = whole
            for other in modes_of(state):
                if other != mode:
                    whitened = multiply(whitened, state[f"root_{other}"], other)
            parts.append((mode, count, whitened / math.sqrt(whole[0].numel() // whole.shape[mode + 1])))
        self._add(state, parts, found_inf)

    def compute(self, state: dict[str, Tensor], step: int, conditions: list[Tensor]) -> RefreshResult:
        modes = modes_of(state)
        scale = torch.ones_like(state["scale"])
        result: dict[str, Tensor] = {}
        failed: set[int] = set()
        for mode in modes:
            matrices = self._corrected(state, mode, step)
            mean = matrices.diagonal(dim1=-2, dim2=-1).mean(-1)
            mean = torch.where(mean > 0, mean, 1.0)  # no gradient yet
            tensors, wrong = self._refreshed(state, mode, matrices, self._config.root(len(modes)), step, conditions)
            tensors[f"root_{mode}"] = tensors[f"root_{mode}"] * mean.sqrt().view(-1, 1, 1)
            scale *= power(mean, -0.5 / len(modes))
            result |= tensors
            failed.update(wrong)
        return RefreshResult({**result, "scale": scale}, frozenset(failed))

    def apply(self, state: dict[str, Tensor], entered: Tensor, moments: Tensor, found_inf: FoundInf | None) -> Tensor:
        update = super().apply(state, entered, moments, found_inf)
        return update * state["scale"].view(-1, *[1] * (moments.ndim - 1))
