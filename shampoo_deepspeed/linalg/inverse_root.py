"""Inverse p-th roots of stacks of symmetric positive semi-definite matrices. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import product
from shampoo_deepspeed.linalg.newton import coupled_newton, without_reads
from shampoo_deepspeed.linalg.precision import fast_float64, full_precision, no_switch_counts, power, row_means

# From this many elements on, the CPU finds the extremes of a row faster by a separate call.
LONG = 1 << 12
# Devices whose eigenvectors are not checked. On others every element of V'V - I must be smaller than ORTHONORMAL;
# float32 rounding stays below a tenth of it.
TRUSTED = ("cpu",)
ORTHONORMAL = 1e-2
# Roots are bounded, so that neither they nor their products with a block overflow, for any root p. Of all modes of a
# block together, the elements of a root differ by a factor of 2^SPREAD at most, and the smallest one is between
# 2^-SCALE and 2^SCALE. With p >= 1 this changes nothing that float32 factor matrices resolve.
SPREAD, SCALE = 40.0, 80.0


def symmetric(matrices: Tensor) -> Tensor:
    """The symmetric matrices [B, d, d] with these lower triangles, as new tensors."""
    return matrices.tril() + matrices.tril(-1).mT


def inverse_root(
    matrices: Tensor,
    root: float,
    epsilon: float,
    relative_epsilon: float,
    dtype: torch.dtype,
    solver: str = "eigh",
    damping: str = "shift",
    in_float64: bool = False,
    conditions: list[Tensor] | None = None,
    share: float | None = None,
    reads: bool = True,
) -> tuple[Tensor, list[int]]:
    """A^(-1/root) of each matrix of a stack (arXiv 2309.06497, section 4.1).

    Eigenvalues are regularised (``regularised``); one that is zero then gets root 0. Coupled Newton shifts by an
    upper bound of l_max (``newton.upper_bound``). A matrix that does not converge goes to the eigendecomposition; if
    that fails or is not finite, it is repeated in float64.

    Args:
        matrices: [B, d, d], of which only the lower triangles are read; dtypes narrower than float32 are widened to
            it.
        root: p > 0.
        epsilon, relative_epsilon: absolute and relative regularisation, >= 0.
        dtype: dtype of the result.
        solver: ``"auto" | "eigh" | "coupled_newton"``; ``chosen_solver`` may replace it.
        damping: ``"shift" | "cutoff" | "saturate"``; the last two need the eigenvalues, so they always decompose.
        in_float64: decompose float32 matrices in float64 too. This takes about twice the time. The root is then
            accurate to rounding even if the ridge is near the rounding error of the largest eigenvalue.
        conditions: a list to which solvers that know it append the largest condition number of the regularised
            matrices, 0-d.
        share: bounds the roots, such that the product of several with these shares, whose sum is 1, is in range;
            None: as they are.
        reads: whether an accelerator may be read. If not, what fails is not tried another way.

    Returns:
        The roots [B, d, d], symmetric to the last bit, and the rows that failed even in float64 (their content is
        undefined). Without reads no row is named, and the content of those that failed is not finite.
    """
    work = matrices if matrices.dtype == torch.float64 else matrices.float()
    rule = RootOfEigenvalues(root, epsilon, relative_epsilon, damping, conditions, share)
    if solver == "auto" and work.device.type != "cpu" and no_switch_counts() and not fast_float64(work.device):
        solver = "eigh"  # iterations would be in float64 (see ``precision``)
    solver = chosen_solver(solver, work, root, relative_epsilon, damping)
    if solver == "eigh":
        roots, failed = _by_eigh(work, rule, in_float64, reads)
        return roots.to(dtype), failed
    work = symmetric(work)
    if not reads:
        return without_reads(work, int(root), epsilon, relative_epsilon).to(dtype), []
    independent = no_switch_counts()
    with nullcontext() if independent else full_precision(work.device.type):
        roots, left = coupled_newton(work.double() if independent else work, int(root), epsilon, relative_epsilon)
    left = sorted({*left, *non_finite(roots)})
    if not left:
        return roots.to(dtype), []
    found, wrong = _by_eigh(work[left], rule, in_float64)
    roots[left] = found.to(roots.dtype)
    return roots.to(dtype), [left[n] for n in wrong]


def chosen_solver(solver: str, work: Tensor, root: float, relative_epsilon: float, damping: str) -> str:
    """The solver for a stack: the requested one if it can compute this root, else the eigendecomposition.

    ``"auto"`` is the eigendecomposition on the CPU, where it costs as much as 5 to 8 products. On other devices it is
    coupled Newton if the ridge exceeds the rounding error of the largest eigenvalue, so that it converges. See
    docs/solvers.md.
    """
    if damping != "shift":
        return "eigh"  # to compare eigenvalues with the ridge, they must be known
    newton = root == int(root)
    if solver == "auto":
        covered = relative_epsilon >= 4.0 * torch.finfo(work.dtype).eps
        return "coupled_newton" if work.device.type != "cpu" and newton and covered else "eigh"
    return solver if newton else "eigh"


def inverse_power(values: Tensor, root: float) -> Tensor:
    """``values ** (-1 / root)``, element by element.

    For roots 2, 4 and 8 by square roots, which are rounded correctly everywhere in memory, unlike ``pow``.
    """
    if root not in (2.0, 4.0, 8.0):
        return power(values, -1.0 / root)
    if values.device.type != "cpu":
        for _ in range(int(root).bit_length() - 2):
            values = values.sqrt()
        return values.rsqrt()
    for _ in range(int(root).bit_length() - 1):
        values = values.sqrt()
    return values.reciprocal()


class RootOfEigenvalues(NamedTuple):
    """Computes roots of eigenvalues; ``inverse_root`` explains the fields."""

    root: float
    epsilon: float
    relative_epsilon: float
    damping: str
    conditions: list[Tensor] | None = None
    share: float | None = None

    def of(self, values: Tensor) -> Tensor:
        """l^(-1/root) of eigenvalues [B, d] in any order, regularised; 0 for those that are 0 then."""
        values = regularised(values, self.epsilon, self.relative_epsilon, self.damping)
        if self.conditions is not None and values.numel():
            left = torch.where(values > 0, values, torch.inf) if self.damping == "cutoff" else values
            smallest = left.amin(dim=-1)
            # A matrix without a condition number (all zero, or not finite) does not count.
            self.conditions.append((values.amax(dim=-1) / smallest).nan_to_num(nan=0.0, posinf=torch.inf).amax())
        held = values
        if self.share is not None:
            largest = values.amax(dim=-1, keepdim=True)
            least = largest * 2.0 ** (-SPREAD * self.share * self.root)
            held = bounded(torch.maximum(values, least), largest, self.root, self.share)
        powers = inverse_power(held.clamp_min(torch.finfo(values.dtype).tiny), self.root)
        return torch.where(values == 0, 0.0, powers)


def bounded(values: Tensor, largest: Tensor, root: float, share: float = 1.0) -> Tensor:
    """The values, scaled such that ``largest ** (1 / root)`` is between 2^-SCALE and 2^SCALE, or this share of it.

    Values are as they are if it is already. A root p < 1 has narrower bounds, because it amplifies more.
    """
    most = range_of_largest(values.dtype, root, share)
    target = largest.clamp(1.0 / most, most)
    return torch.where((target == largest) | (largest == 0), values, values / largest * target)


def range_of_largest(dtype: torch.dtype, root: float, share: float) -> float:
    """The number up to which ``bounded`` leaves the largest value, and down to whose reciprocal."""
    return float(2.0 ** min(SCALE * share * min(root, root * root), math.log2(torch.finfo(dtype).max) - 2.0))


def _by_eigh(work: Tensor, rule: RootOfEigenvalues, in_float64: bool, reads: bool = True) -> tuple[Tensor, list[int]]:
    """The roots in the dtype of ``work``, and the rows that failed in float64 too; without ``reads`` these are NaN."""
    roots = torch.empty_like(work)
    if not in_float64:
        roots = _stack_root(work, rule)
    failed: list[int] = []
    if not reads:
        for row in range(len(work)) if in_float64 else ():
            roots[row] = _stack_root(work[row : row + 1].double(), rule)[0]
        return roots, failed
    for row in range(len(work)) if in_float64 else non_finite(roots):
        # One at a time: float64 copies of a whole stack would be most of the memory that a step needs.
        narrow = _stack_root(work[row : row + 1].double(), rule).to(roots.dtype)  # this may overflow
        if non_finite(narrow):
            failed.append(row)
        else:
            roots[row] = narrow[0]
    return roots, failed


def diagonal_root(
    diagonals: Tensor,
    root: float,
    epsilon: float,
    relative_epsilon: float,
    dtype: torch.dtype,
    damping: str,
    conditions: list[Tensor] | None = None,
    share: float | None = None,
    reads: bool = True,
) -> tuple[Tensor, list[int]]:
    """``inverse_root`` of diagonal matrices [B, d]; their entries are their eigenvalues."""
    work = diagonals if diagonals.dtype == torch.float64 else diagonals.float()
    rule = RootOfEigenvalues(root, epsilon, relative_epsilon, damping, conditions, share)
    roots = rule.of(work).to(dtype)
    if not reads:  # the root of infinity is 0
        return torch.where(work.isfinite().all(-1, keepdim=True), roots, torch.nan), []
    return roots, non_finite(torch.stack([work, roots.to(work.dtype)], dim=-1))  # the root of infinity is 0


def decomposed(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors in ascending order; each matrix's depend on its values alone (see ``precision``).

    NaN for a matrix for which LAPACK or cuSOLVER reports no convergence, or whose eigenvectors from an accelerator
    are not orthonormal.
    """
    if matrices.device.type in TRUSTED:
        return _one_by_one(matrices)
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except RuntimeError as error:  # LinAlgError is a subclass
        if not _did_not_converge(error):
            raise
        values, vectors = _one_by_one(matrices)
    return checked(values, vectors)


def _one_by_one(matrices: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = torch.empty_like(matrices[..., 0]), torch.empty_like(matrices).mT  # columns are contiguous
    for row, matrix in enumerate(matrices):
        try:
            values[row], vectors[row] = torch.linalg.eigh(matrix)
        except RuntimeError as error:
            if not _did_not_converge(error):
                raise
            values[row], vectors[row] = torch.nan, torch.nan
    return values, vectors


def _did_not_converge(error: RuntimeError) -> bool:
    """Whether an error reports a failure to converge; some cuSOLVER versions raise another one than LinAlgError."""
    return isinstance(error, torch.linalg.LinAlgError) or "cusolver" in str(error).lower()


def checked(values: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [B, d] and eigenvectors [B, d, d], NaN for matrices whose vectors are not orthonormal.

    Batched kernels of cuSOLVER have returned such vectors without an error (pytorch issue 192483). The check costs one
    product, the decomposition many, and nothing is read on the CPU.
    """
    gram = product(vectors.mT, vectors)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    wrong = ~(gram.abs().amax(dim=(-2, -1)) < ORTHONORMAL)  # NaN too
    return values.masked_fill(wrong[:, None], torch.nan), vectors.masked_fill(wrong[:, None, None], torch.nan)


def _stack_root(matrices: Tensor, rule: RootOfEigenvalues) -> Tensor:
    """The roots, symmetric to the last bit; NaN for matrices whose decomposition failed."""
    values, vectors = decomposed(matrices)
    roots = product(vectors * rule.of(values).unsqueeze(-2), vectors.mT)
    return roots.tril_() + roots.tril(-1).mT


def regularised(values: Tensor, epsilon: float, relative_epsilon: float, damping: str = "shift") -> Tensor:
    """Regularised eigenvalues [B, d], in any order, with the ridge r = ``max(epsilon, relative_epsilon * l_max)``.

    Args:
        damping: ``"shift"``, the formula of all solvers, gives ``l - min(l_min, 0) + r``; ``"saturate"`` gives
            ``max(l, r)``, and ``"cutoff"`` gives l if it is above r, and else 0.
    """
    ridge = (relative_epsilon * values.amax(dim=-1, keepdim=True)).clamp_min(epsilon)
    if damping == "cutoff":
        return torch.where(values > ridge, values, 0.0 * values)  # NaN stays NaN, to be detected
    if damping == "saturate":
        return torch.maximum(values, ridge)
    return values - values.amin(dim=-1, keepdim=True).clamp_max(0.0) + ridge


def shrunk(matrices: Tensor, share: float) -> Tensor:
    """(1 - share) A + share mean(diag A) I of matrices [B, d, d] or diagonals [B, d], as new tensors.

    The trace stays, and all eigenvalues move towards their mean (Ledoit and Wolf 2004, "A well-conditioned estimator
    for large-dimensional covariance matrices").
    """
    out = (1.0 - share) * matrices
    before, after = (t if t.ndim == 2 else t.diagonal(dim1=-2, dim2=-1) for t in (matrices, out))
    after.add_(share * row_means(before))
    return out


def non_finite(stack: Tensor) -> list[int]:
    """Rows of [B, ...] with an entry that is not finite; read on the CPU."""
    flat = stack.flatten(1)
    one_by_one = flat.device.type == "cpu" and flat.shape[1] >= LONG
    low, high = extremes(flat.unbind()) if one_by_one else torch.aminmax(flat, dim=1)
    finite = torch.isfinite(low) & torch.isfinite(high)
    return [row for row, good in enumerate(finite.tolist()) if not good]


def extremes(tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """The smallest and the largest element of each tensor, both NaN if it contains NaN: [len(tensors)] each.

    Written for the CPU, whose kernel takes fifteen times as long along a dim and twenty times for a maximum norm.
    """
    found = [torch.aminmax(tensor) for tensor in tensors]
    return torch.stack([pair.min for pair in found]), torch.stack([pair.max for pair in found])
