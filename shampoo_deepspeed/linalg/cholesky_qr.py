"""Orthonormal bases by products, Cholesky factors and triangular solves, for devices on which QR is slow.

Batched QR on CUDA is a loop of single ones (pytorch issue 143281), while all steps here are batched kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import product

PASSES = 3
# Share of its diagonal that is added to the first Gram matrix. A Gram matrix squares the condition number, so float32
# loses columns that depend on others to 3e-4. With the shift they become orthogonal over the passes.
SHIFT = 1e-5
# If the last Gram matrix is the identity up to this, its pass leaves a deviation of rounding alone.
NEARLY = 0.05


def cholesky_qr(matrices: Tensor) -> Tensor:
    """Q of each matrix's QR decomposition with a positive diagonal of R, by shifted CholeskyQR (arXiv 1809.11085).

    A pass is X <- X R^-1 with the Cholesky factor R'R = X'X. That takes 5/3 d^3 multiply-adds: the Gram matrix 1, its
    factor 1/6 and the solve 1/2. Nothing is read on the CPU.

    Args:
        matrices: [B, d, d], float32 or float64. Columns may differ in scale, such as those of A Q.

    Returns:
        [B, d, d]; NaN for matrices whose columns are dependent or not finite, so that no basis comes of them.
    """
    out, gram = passes(_unit_columns(matrices))
    return out.masked_fill(_far_from_identity(gram)[:, None, None], torch.nan)


def passes(columns: Tensor) -> tuple[Tensor, Tensor]:
    """The passes of ``cholesky_qr``: Q, and the Gram matrices before the last one, by which to tell whether it is one.

    Args:
        columns: [B, d, d]. They may have any norms the squares of which are in range, for each pass scales columns.
    """
    for number in range(PASSES):
        gram = product(columns.mT, columns)
        if number == 0:
            gram.diagonal(dim1=-2, dim2=-1).mul_(1.0 + SHIFT)
        factor, _ = torch.linalg.cholesky_ex(gram)  # garbage or NaN if it fails, which the last Gram matrix shows
        columns = torch.linalg.solve_triangular(factor.mT, columns, upper=True, left=False)
    return columns, gram


def _unit_columns(matrices: Tensor) -> Tensor:
    """The matrices with columns of norm 1, also where squares are out of range; a column of zeros gives NaN."""
    peaks = torch.linalg.vector_norm(matrices, torch.inf, dim=-2, keepdim=True)
    columns = matrices / peaks
    return columns / torch.linalg.vector_norm(columns, dim=-2, keepdim=True)


def _far_from_identity(gram: Tensor) -> Tensor:
    """[B] bool: which Gram matrices are not nearly the identity; those with NaN are not either."""
    deviations = gram.clone()
    deviations.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return ~(deviations.abs().amax(dim=(-2, -1)) < NEARLY)
