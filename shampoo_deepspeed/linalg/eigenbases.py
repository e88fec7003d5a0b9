"""Eigenbases of stacks of symmetric positive semi-definite matrices: computed, advanced, judged. Pure functions.

Bases are [B, d, d] with an eigenvector in each column. A basis of zeros has not been
computed yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.inverse_root import RootOfEigenvalues, decomposed, non_finite
from shampoo_deepspeed.linalg.mode_products import product


def eigenbasis(matrices: Tensor, in_float64: bool = False) -> tuple[Tensor, Tensor, list[int]]:
    """Eigenvalues and eigenvectors in descending order.

    A matrix whose eigendecomposition fails or is not finite is tried again in float64.

    Args:
        matrices: [B, d, d], symmetric, float32 or float64.
        in_float64: decompose in float64 right away, one matrix after another.

    Returns:
        Eigenvalues [B, d], bases [B, d, d], and the rows that failed even in float64 (their content is undefined).
    """
    values, vectors = torch.empty_like(matrices[..., 0]), torch.empty_like(matrices)
    if not in_float64:
        values, vectors = decomposed(matrices)
    failed = []
    for row in range(len(matrices)) if in_float64 else non_finite(vectors):
        again = decomposed(matrices[row : row + 1].double())
        if non_finite(again[1]):
            failed.append(row)
        else:
            values[row], vectors[row] = again[0][0].to(values.dtype), again[1][0].to(vectors.dtype)
    return values.flip(-1), vectors.flip(-1), failed


def power_step(matrices: Tensor, bases: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """One step of orthogonal iteration from known bases (arXiv 2409.11321, algorithm 4).

    Columns are first sorted by their eigenvalue estimates q'Aq, in descending order. Gram-Schmidt leaves to later
    columns only what earlier ones do not span, so dominant directions must come first.

    Args:
        ridge: relative to the largest estimate. Columns with eigenvalues far below it stay as they are; without it
            the product turns them into rounding noise, different in each step.

    Returns:
        The bases Q of (A + ridge max(l) I) Q_ordered = QR, orthonormal for singular A too, and the order [B, d]:
        column i of a result continues column ``order[i]`` of ``bases``.
    """
    products = product(matrices, bases)
    estimates = (bases * products).sum(-2)
    order = estimates.argsort(dim=-1, descending=True, stable=True)
    if ridge > 0:
        products = products + (ridge * estimates.amax(-1)).view(-1, 1, 1) * bases
    return orthonormalised(products.gather(-1, order.unsqueeze(-2).expand_as(products))), order


def orthonormalised(matrices: Tensor) -> Tensor:
    """Q of each matrix's QR decomposition [B, d, d]; it depends on the matrix's values alone (see ``precision``)."""
    if matrices.device.type != "cpu":
        return torch.linalg.qr(matrices)[0]
    out = torch.empty_like(matrices)
    for matrix, target in zip(matrices, out, strict=True):
        target.copy_(torch.linalg.qr(matrix)[0])
    return out


def known(bases: Tensor) -> Tensor:
    """[B] bool: which bases have been computed."""
    return bases.flatten(1).any(1)


def in_basis(matrices: Tensor, bases: Tensor) -> Tensor:
    """Q'AQ of each matrix."""
    return product(bases.mT, product(matrices, bases))


def good_enough(matrices: Tensor, bases: Tensor, tolerance: float, inside: Tensor | None = None) -> Tensor:
    """[B] bool: known bases with ||offdiag(Q'AQ)||_F <= tolerance ||A||_F (arXiv 2506.03595, section 4.2).

    Each row depends on its own matrix alone, so the decision does not depend on which rank owns a block. ``inside`` is
    Q'AQ if the caller has computed it already.
    """
    inside = in_basis(matrices, bases) if inside is None else inside
    off = torch.linalg.matrix_norm(inside - torch.diag_embed(inside.diagonal(dim1=-2, dim2=-1)))
    whole = torch.linalg.matrix_norm(matrices)
    return known(bases) & (off <= tolerance * whole)


def kept_or_new(
    matrices: Tensor, bases: Tensor, tolerance: float, in_float64: bool = False
) -> tuple[Tensor, Tensor, list[int]]:
    """Eigenvalues and bases: bases that are good enough are kept and give diag(Q'AQ); the others are computed.

    Returns:
        Eigenvalues [B, d] in the order of the columns, bases [B, d, d], and the rows that failed.
    """
    inside = in_basis(matrices, bases)
    stays = good_enough(matrices, bases, tolerance, inside)
    values = inside.diagonal(dim1=-2, dim2=-1).clone()
    vectors = bases.clone()
    rows = (~stays).nonzero().flatten()
    if not len(rows):
        return values, vectors, []
    values[rows], vectors[rows], failed = eigenbasis(matrices[rows], in_float64)
    return values, vectors, rows[failed].tolist()


def root_from_basis(
    values: Tensor,
    bases: Tensor,
    root: float,
    epsilon: float,
    relative_epsilon: float,
    damping: str,
    share: float | None = None,
) -> tuple[Tensor, list[int]]:
    """Q diag(l)^(-1/root) Q' with the regularisation of ``inverse_root``, and the rows that are not finite."""
    order = values.argsort(dim=-1)
    scales = RootOfEigenvalues(root, epsilon, relative_epsilon, damping, share=share).of(values.gather(-1, order))
    columns = bases.gather(-1, order.unsqueeze(-2).expand_as(bases))
    roots = product(columns * scales.unsqueeze(-2), columns.mT)
    return roots, non_finite(roots)
