"""Orthogonalises matrices by products alone: all singular values move near 1. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import product
from shampoo_deepspeed.linalg.precision import no_switch_counts

# The quintic X <- a X + b XX'X + c (XX')^2 X of Keller Jordan's Muon, as in torch.optim.Muon. Five iterations bring
# singular values from 0.003 to 1 of the norm to between 0.68 and 1.21; the exact value does not matter to training.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
LEAST_NORM = 2.0**-40


def orthogonalised(matrices: Tensor, scale: float = 1.0) -> Tensor:
    """Each matrix with its singular vectors, and singular values near 1 (arXiv 2502.16982, section 2.1).

    Args:
        matrices: [B, m, n]. On CPUs their scale does not matter, even if squares are out of range. On accelerators they
            must be of about 1, as updates are: smaller ones, as after the last gradient, fade to zero.
        scale: what the result is multiplied by.

    Returns:
        A new tensor [B, m, n]. A zero matrix stays zero. Each result depends on its own matrix alone.
    """
    if matrices.device.type != "cpu" and not no_switch_counts():
        return _with_few_operators(matrices, scale)
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT, scale).mT.contiguous()
    a, b, c = COEFFICIENTS
    # The polynomial grows without bound beyond 1.2, so the norm must be accurate even if squares underflow.
    peaks = torch.linalg.vector_norm(matrices, torch.inf, dim=(1, 2), keepdim=True)
    out = torch.where(peaks > 0, matrices / peaks, 0.0)
    out = out / torch.linalg.vector_norm(out, dim=(1, 2), keepdim=True).clamp_min(1.0)
    for _ in range(ITERATIONS):
        gram = product(out, out.mT)
        out = a * out + product(b * gram + c * product(gram, gram), out)
    return out if scale == 1.0 else out * scale


def _with_few_operators(matrices: Tensor, scale: float) -> Tensor:
    """``orthogonalised`` on accelerators: three products in an iteration, with all sums in them, and no copies.

    Tall matrices are multiplied from the right instead of being transposed: X <- X (a I + b X'X + c (X'X)^2).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    # Squares of matrices of this norm have not underflowed, and smaller ones stay small.
    out = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_min_(LEAST_NORM)
    for number in range(ITERATIONS):
        factor = scale if number == ITERATIONS - 1 else 1.0
        gram = torch.bmm(out.mT, out) if tall else torch.bmm(out, out.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (out, inner) if tall else (inner, out)
        out = torch.baddbmm(out, left, right, beta=a * factor, alpha=factor)
    return out
