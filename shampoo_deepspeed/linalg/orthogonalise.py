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


def orthogonalised(matrices: Tensor, scale: float = 1.0, in_range: bool = False) -> Tensor:
    """Each matrix with its singular vectors, and singular values near 1 (arXiv 2502.16982, section 2.1).

    Args:
        matrices: [B, m, n]. Their scale does not matter, even if squares are out of range.
        scale: what the result is multiplied by.
        in_range: whether matrices are either of about 1 or so small that they do not matter, which saves accelerators
            a look at their scale.

    Returns:
        A new tensor [B, m, n]. A zero matrix stays zero. Each result depends on its own matrix alone.
    """
    if matrices.device.type != "cpu" and not no_switch_counts():
        return _with_few_operators(matrices, scale, in_range)
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


def _with_few_operators(matrices: Tensor, scale: float, in_range: bool) -> Tensor:
    """``orthogonalised`` on accelerators: three products in an iteration, with all sums in them, and no copies.

    Tall matrices are multiplied from the right instead of being transposed: X <- X (a I + b X'X + c (X'X)^2).
    """
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    if in_range:  # squares of matrices of this norm have not underflowed, and smaller ones stay small
        out = matrices / torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True).clamp_min_(LEAST_NORM)
    else:
        peaks = torch.linalg.vector_norm(matrices, torch.inf, dim=(1, 2), keepdim=True)
        out = matrices / torch.threshold(peaks, 0.0, 1.0)
        out.div_(torch.linalg.vector_norm(out, dim=(1, 2), keepdim=True).clamp_min_(1.0))
    for number in range(ITERATIONS):
        factor = scale if number == ITERATIONS - 1 else 1.0
        gram = torch.bmm(out.mT, out) if tall else torch.bmm(out, out.mT)
        inner = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        left, right = (out, inner) if tall else (inner, out)
        out = torch.baddbmm(out, left, right, beta=a * factor, alpha=factor)
    return out
