"""Orthogonalises matrices by products alone: all singular values move near 1. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import product

# The quintic X <- a X + b XX'X + c (XX')^2 X of Keller Jordan's Muon, as in torch.optim.Muon. Five iterations bring
# singular values from 0.003 to 1 of the norm to between 0.68 and 1.21; the exact value does not matter to training.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices: Tensor) -> Tensor:
    """Each matrix with its singular vectors, and singular values near 1 (arXiv 2502.16982, section 2.1).

    Args:
        matrices: [B, m, n]. Their scale does not matter, even if squares are out of range.

    Returns:
        A new tensor [B, m, n]. A zero matrix stays zero. Each result depends on its own matrix alone.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalised(matrices.mT).mT.contiguous()
    a, b, c = COEFFICIENTS
    # The polynomial grows without bound beyond 1.2, so the norm must be accurate even if squares underflow.
    peaks = torch.linalg.vector_norm(matrices, torch.inf, dim=(1, 2), keepdim=True)
    out = torch.where(peaks > 0, matrices / peaks, 0.0)
    out = out / torch.linalg.vector_norm(out, dim=(1, 2), keepdim=True).clamp_min(1.0)
    for _ in range(ITERATIONS):
        gram = product(out, out.mT)
        out = a * out + product(b * gram + c * product(gram, gram), out)
    return out
