"""Bases and roots of a whole stack on an accelerator, in few operators and without a read. Pure functions.

What `eigenbases` and `inverse_root` compute row by row and mode by mode is here computed for all modes together. Modes
of one size are one stack, and eigenvalues of all modes are one tensor. Nothing depends on data: every matrix takes
every step, and what went wrong is a number for each matrix, which stays on the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.cholesky_qr import NEARLY, passes
from shampoo_deepspeed.linalg.eigenbases import eigenbasis, rayleigh
from shampoo_deepspeed.linalg.inverse_root import SPREAD, RootOfEigenvalues, inverse_power, range_of_largest
from shampoo_deepspeed.linalg.mode_products import bmm

# A step of orthogonal iteration has at least this ridge here. It is far below the rounding of the product, which would
# otherwise be all that is left in directions of eigenvalue 0.
LEAST_RIDGE = 2.0**-40
# A relative ridge from which on the rounding of the smallest eigenvalue cannot make the sum zero.
SURE_RIDGE = 1e-6


class Group(NamedTuple):
    """Modes of one size d, with their n matrices of B blocks as one stack.

    Attributes:
        modes: their numbers.
        places: where they are in tensors of all modes, such as ``Bases.wrong``.
        matrices: [n B, d, d], symmetric.
        bases: [n B, d, d].
        order: [n B, d]: column i continues column ``order[:, i]`` of the bases before.
    """

    modes: tuple[int, ...]
    places: slice
    matrices: Tensor
    bases: Tensor
    order: Tensor

    def each(self, stack: Tensor) -> dict[int, Tensor]:
        """Each mode's part of a tensor [n B, ...]."""
        return dict(zip(self.modes, stack.chunk(len(self.modes)), strict=True))


@lru_cache(maxsize=32)
def _lower(d: int, device: torch.device) -> Tensor:
    """[d, d] bool: the lower triangle with the diagonal."""
    return torch.ones(d, d, dtype=torch.bool, device=device).tril_()


def symmetric(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices [B, d, d] of several modes with these lower triangles, as one new stack."""
    first = matrices[0]
    out = first.new_empty(len(matrices) * len(first), *first.shape[1:])
    for part, own in zip(out.split(len(first)), matrices, strict=True):
        torch.where(_lower(first.shape[-1], first.device), own, own.mT, out=part)
    return out


class Bases(NamedTuple):
    """All modes' bases after a refresh.

    Attributes:
        groups: by size.
        wrong: [2, modes, B], by the places of modes: first how far a basis is from orthonormal, `NEARLY` or more or NaN
            where it is none; then what ``scales`` writes, NaN where it fails.
    """

    groups: list[Group]
    wrong: Tensor

    def good(self, scaled: bool) -> Tensor:
        """[B] bool: the blocks for which nothing is wrong in any mode, in ``scales`` either if that was called."""
        return self.wrong[: 1 + scaled].amax((0, 1)) < NEARLY


def tracked(matrices: Mapping[int, Tensor], bases: Mapping[int, Tensor], steps: int, ridge: float) -> Bases:
    """All modes' bases after ``steps`` of `eigenbases.power_step`.

    Args:
        matrices: [B, d, d] by mode, float32 or float64, of which only the lower triangles are read.
        bases: the last ones, all of them known, in the same dtype.
        steps: 1 or more.
        ridge: relative to the largest eigenvalue, see `power_step`.
    """
    found, wrong = list[Group](), _numbers(matrices)
    for d in dict.fromkeys(matrix.shape[-1] for matrix in matrices.values()):
        modes = tuple(mode for mode, matrix in matrices.items() if matrix.shape[-1] == d)
        own = symmetric([matrices[mode] for mode in modes])
        known = [bases[mode] for mode in modes]
        first = found[-1].places.stop if found else 0
        places = slice(first, first + len(modes))
        turned, order = _stepped(own, torch.cat(known) if len(known) > 1 else known[0], ridge, wrong[0, places])
        for _ in range(steps - 1):
            before = wrong[0, places].clone()
            turned, moves = _stepped(own, turned, ridge, wrong[0, places])
            order = order.gather(-1, moves)
            torch.maximum(wrong[0, places], before, out=wrong[0, places])
        found.append(Group(modes, places, own, turned, order))
    return Bases(found, wrong)


def _numbers(matrices: Mapping[int, Tensor]) -> Tensor:
    """Memory for ``Bases.wrong``."""
    first = next(iter(matrices.values()))
    return first.new_empty(2, len(matrices), len(first))


def decomposed_anew(matrices: Mapping[int, Tensor], bases: Mapping[int, Tensor]) -> Bases:
    """All modes' bases by eigendecompositions in float64, in descending order of eigenvalues.

    Args:
        matrices, bases: as for ``tracked``; the order is by the estimates of the last bases.
    """
    found, wrong = list[Group](), _numbers(matrices)
    for place, (mode, matrix) in enumerate(matrices.items()):
        own = symmetric([matrix])
        order = rayleigh(own, bases[mode]).argsort(dim=-1, descending=True, stable=True)
        vectors = eigenbasis(own, in_float64=True, reads=False)[1]
        torch.mul(torch.linalg.vector_norm(vectors, torch.inf, dim=(1, 2)), 0.0, out=wrong[0, place])
        found.append(Group((mode,), slice(place, place + 1), own, vectors, order))
    return Bases(found, wrong)


def _stepped(matrices: Tensor, bases: Tensor, ridge: float, wrong: Tensor) -> tuple[Tensor, Tensor]:
    """Bases after one step and their order; how far they are from orthonormal is written into ``wrong`` [n, B]."""
    products = bmm(matrices, bases)
    estimates, order = (bases * products).sum(-2).sort(dim=-1, descending=True, stable=True)
    # In units of the largest eigenvalue, so that squares are in range. The columns of a zero matrix stay as they are.
    largest = torch.threshold(estimates[:, :1], 0.0, 1.0).unsqueeze(-1)
    products = torch.addcdiv(bases, products, largest, value=1.0 / max(ridge, LEAST_RIDGE))
    turned, gram = passes(products.gather(-1, order.unsqueeze(-2).expand_as(products)))
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    torch.linalg.vector_norm(gram.view(*wrong.shape, *gram.shape[1:]), torch.inf, dim=(2, 3), out=wrong)
    return turned, order


class Spectra(NamedTuple):
    """Eigenvalues of all modes, as one tensor.

    Attributes:
        values: [modes, B, n]: each mode's eigenvalues in the order of its columns, and then numbers between them: the
            mean eigenvalue at last, if it is needed. So the extremes of a row are those of the eigenvalues.
        bases: the bases.
    """

    values: Tensor
    bases: Bases

    @property
    def count(self) -> int:  # type: ignore[override]
        """The number of modes."""
        return len(self.values)

    @property
    def means(self) -> Tensor:
        """The mean eigenvalue [modes, B, 1], if there is one; a view."""
        return self.values[..., -1:]

    def by_mode(self, numbers: Tensor) -> dict[int, Tensor]:
        """Each mode's own part [B, d] of numbers [modes, B, n]."""
        out: dict[int, Tensor] = {}
        for group in self.bases.groups:
            out.update(zip(group.modes, numbers[group.places, :, : group.bases.shape[-1]], strict=True))
        return out


def spectra(bases: Bases, divisors: Sequence[float], means: bool = False) -> Spectra:
    """Estimates of the eigenvalues (`eigenbases.rayleigh`) of matrices that are divided by a number for each mode.

    Args:
        divisors: by the places of modes.
        means: whether mean eigenvalues are needed.
    """
    count, blocks = bases.wrong.shape[1:]
    largest = max(group.bases.shape[-1] for group in bases.groups)
    values = bases.groups[0].bases.new_empty(count, blocks, largest + means)
    for group in bases.groups:
        d, own = group.bases.shape[-1], values[group.places]
        products = bmm(group.matrices, group.bases).mul_(group.bases)
        torch.sum(products.view(*own.shape[:2], d, d), -2, out=own[..., :d])
        if means:
            diagonals = group.matrices.diagonal(dim1=-2, dim2=-1).view(*own.shape[:2], d)
            torch.mean(diagonals, -1, keepdim=True, out=own[..., -1:])
        if d < largest:
            own[..., d:largest].copy_(own[..., :1])
    for part, divisor in zip(values, divisors, strict=True) if len(set(divisors)) > 1 else [(values, divisors[0])]:
        if divisor != 1.0:
            part.div_(divisor)
    return Spectra(values, bases)


def scales(spectrum: Spectra, rule: RootOfEigenvalues, in_range: bool, power: float | None = None) -> Tensor:
    """`RootOfEigenvalues.of` of eigenvalues, in few operators for the damping "shift".

    Where an eigenvalue is not finite, ``spectrum.bases.wrong`` is set to NaN.

    Args:
        rule: with a share.
        in_range: whether gradients are normalized. Then no eigenvalue is near the bounds of ``bounded`` above, nor one
            with such a ridge below.
        power: the root that is taken, p or 2p; None: p.

    Returns:
        [modes, B, n].
    """
    values, found = spectrum.values, spectrum.bases.wrong[1].unsqueeze(-1)
    root, epsilon, relative_epsilon, damping, conditions, share = rule
    assert share is not None
    low, high = values.aminmax(dim=-1, keepdim=True)
    torch.mul(high, 0.0, out=found)
    if damping != "shift":
        scaled = rule.of(values)
        return scaled if power in (None, root) else scaled.sqrt_()
    shift = (relative_epsilon * high).clamp_min_(epsilon).sub_(low.clamp_max(0.0))
    held = values + shift
    if conditions is not None:
        conditions.append(((high + shift) / (low + shift)).nan_to_num(nan=0.0, posinf=torch.inf).amax())
    least = 2.0 ** (-SPREAD * share * root)
    if relative_epsilon < least:  # else the ridge does as much
        held = torch.maximum(held, (high + shift) * least)
    most = range_of_largest(values.dtype, root, share)
    # With such a ridge no eigenvalue is 0, up to rounding. Else those of a zero matrix are, and their roots are 0.
    sure = epsilon >= torch.finfo(values.dtype).tiny and relative_epsilon >= SURE_RIDGE
    if not (in_range and sure and epsilon >= 1.0 / most):
        largest = high + shift
        held.mul_(largest.clamp(1.0 / most, most).div_(largest if sure else torch.threshold(largest, 0.0, 1.0)))
    return inverse_power(held if sure else torch.threshold(held, 0.0, torch.inf), power or root)


def roots(spectrum: Spectra, half: Tensor) -> dict[int, Tensor]:
    """Q diag(s^2) Q' of each mode, for numbers s [modes, B, n]."""
    out: dict[int, Tensor] = {}
    for group in spectrum.bases.groups:
        n, d = len(group.modes), group.bases.shape[-1]
        columns = group.bases.view(n, -1, d, d) * half[group.places, :, None, :d]
        columns = columns.view(-1, d, d)
        out.update(group.each(bmm(columns, columns.mT)))
    return out


def all_finite(tensors: Sequence[Tensor]) -> Tensor:
    """[B] bool: the rows of tensors [B, ...] without an element that is not finite."""
    norms = [torch.linalg.vector_norm(t.flatten(1), torch.inf, dim=1).float() for t in tensors]
    return torch.stack(norms).amax(0) < torch.inf
