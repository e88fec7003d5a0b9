"""Eigenbases of stacks of symmetric positive semi-definite matrices: computed, advanced, judged. Pure functions.

Bases are [B, d, d] with an eigenvector in each column. A basis of zeros has not been
computed yet.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.cholesky_qr import cholesky_qr
from shampoo_deepspeed.linalg.inverse_root import RootOfEigenvalues, decomposed, non_finite, symmetric
from shampoo_deepspeed.linalg.mode_products import product
from shampoo_deepspeed.linalg.precision import fast_float64


def eigenbasis(matrices: Tensor, in_float64: bool = False, reads: bool = True) -> tuple[Tensor, Tensor, list[int]]:
    """Eigenvalues and eigenvectors in descending order.

    A matrix whose eigendecomposition fails or is not finite is tried again in float64.

    Args:
        matrices: [B, d, d], symmetric, float32 or float64.
        in_float64: decompose in float64 right away, one matrix after another; not on devices whose float64 is slow,
            where that would take minutes.
        reads: whether an accelerator may be read. If not, nothing is tried again, and what failed is NaN.

    Returns:
        Eigenvalues [B, d], bases [B, d, d], and the rows that failed even in float64 (their content is undefined).
    """
    in_float64 = in_float64 and fast_float64(matrices.device)
    values, vectors = torch.empty_like(matrices[..., 0]), torch.empty_like(matrices)
    if not in_float64:
        values, vectors = decomposed(matrices)
    failed = []
    for row in range(len(matrices)) if in_float64 else non_finite(vectors) if reads else ():
        again = decomposed(matrices[row : row + 1].double())
        if reads and non_finite(again[1]):
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
    largest = estimates.amax(-1).view(-1, 1, 1)
    if ridge > 0:
        products = products + (ridge * largest) * bases
    if matrices.device.type != "cpu":  # CholeskyQR needs columns; those of a zero matrix stay as they are
        products = torch.where(largest == 0, bases, products)
    return orthonormalised(products.gather(-1, order.unsqueeze(-2).expand_as(products))), order


def orthonormalised(matrices: Tensor) -> Tensor:
    """Q of each matrix's QR decomposition [B, d, d]; it depends on the matrix's values alone (see ``precision``).

    On accelerators by ``cholesky_qr``, which gives NaN for dependent columns; signs of columns may differ.
    """
    if matrices.device.type != "cpu":
        return cholesky_qr(matrices)
    out = torch.empty_like(matrices)
    for matrix, target in zip(matrices, out, strict=True):
        target.copy_(torch.linalg.qr(matrix)[0])
    return out


class Renewed(NamedTuple):
    """Bases after a refresh.

    Attributes:
        bases: [B, d, d].
        values: eigenvalues [B, d] in the order of the columns; 0 for bases that took steps (see ``rayleigh``).
        columns: [B, d]: column i continues column ``columns[:, i]`` of the basis before.
        moved: [B] bool: bases that were known and are not the same as before.
        stepped: the rows among them whose bases took steps of orthogonal iteration.
        failed: the rows whose content is undefined.
    """

    bases: Tensor
    values: Tensor
    columns: Tensor
    moved: Tensor
    stepped: Tensor
    failed: list[int]


def renewed(
    matrices: Tensor, bases: Tensor, steps: int, tolerance: float | None, ridge: float = 0.0, in_float64: bool = False
) -> Renewed:
    """Bring eigenbases up to date; those that are not known yet come from an eigendecomposition.

    Args:
        matrices: [B, d, d], symmetric.
        bases: the last ones [B, d, d].
        steps: known bases take so many of ``power_step`` with this ``ridge`` instead of a decomposition, unless 0.
        tolerance: bases that are ``good_enough`` stay; None: none does.
        in_float64: decompose in float64.
    """
    old, inside = known(bases), None
    moved, values = old, torch.zeros_like(bases[..., 0])
    if tolerance is not None:
        inside = in_basis(matrices, bases)
        moved = old & ~good_enough(matrices, bases, tolerance, inside)
        values = inside.diagonal(dim1=-2, dim2=-1).clone()
    out = bases.clone()
    columns = torch.arange(bases.shape[-1], device=bases.device).repeat(len(bases), 1)
    stepping = (moved & (steps > 0)).nonzero().flatten()
    decomposing = (~old if steps else ~old | moved).nonzero().flatten()
    failed: list[int] = []
    if len(decomposing):
        own = matrices[decomposing]
        columns[decomposing] = rayleigh(own, bases[decomposing]).argsort(dim=-1, descending=True, stable=True)
        values[decomposing], out[decomposing], wrong = eigenbasis(own, in_float64)
        failed = decomposing[wrong].tolist()
    if len(stepping):
        values[stepping] = 0.0
        own = matrices[stepping]
        turned, order = power_step(own, bases[stepping], ridge)
        for _ in range(steps - 1):
            turned, moves = power_step(own, turned, ridge)
            order = order.gather(-1, moves)
        out[stepping], columns[stepping] = turned, order
        failed += stepping[non_finite(out[stepping])].tolist()
    return Renewed(out, values, columns, moved, stepping, sorted(failed))


def rayleigh(matrices: Tensor, bases: Tensor) -> Tensor:
    """Estimates of eigenvalues [B, d]: q'Aq of each column q of each basis."""
    return (bases * product(matrices, bases)).sum(-2)


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


def root_from_basis(
    values: Tensor,
    bases: Tensor,
    root: float,
    epsilon: float,
    relative_epsilon: float,
    damping: str,
    share: float | None = None,
) -> tuple[Tensor, list[int]]:
    """Q diag(l)^(-1/root) Q' with the regularisation of ``inverse_root``, and the rows that are not finite.

    The roots are symmetric to the last bit.
    """
    order = values.argsort(dim=-1)
    scales = RootOfEigenvalues(root, epsilon, relative_epsilon, damping, share=share).of(values.gather(-1, order))
    columns = bases.gather(-1, order.unsqueeze(-2).expand_as(bases))
    roots = symmetric(product(columns * scales.unsqueeze(-2), columns.mT))
    return roots, non_finite(roots)
