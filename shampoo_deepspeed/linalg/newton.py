"""Inverse p-th roots by matrix products alone: the coupled Newton iteration on stacks. Pure functions.

For devices on which an eigendecomposition is slow and products are fast. It starts from a matrix M with eigenvalues in
(0, (p + 1) / 2] and drives it to the identity by ``E = I - (M - I) / p``. Each matrix of a stack stops independently;
one that does not converge is left to the caller. Where nothing may be read, all take as many iterations as the worst
needs (``without_reads``).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import bmm
from shampoo_deepspeed.linalg.precision import elementwise, power

MAX_ITERATIONS = 100
_SQUARINGS = 6
_STALL_BELOW = 1e-2


def coupled_newton(matrices: Tensor, root: int, epsilon: float, relative_epsilon: float) -> tuple[Tensor, list[int]]:
    """A^(-1/root) by the coupled Newton iteration (Guo and Higham 2006; arXiv 2002.09018, section 5).

    X <- X E and M <- E^root M, from X = z^(1/root) I and M = z A with z = (root + 1) / (2 s); s bounds A's largest
    eigenvalue.

    Args:
        matrices: [B, d, d], symmetric positive semi-definite, float32 or float64.
        root: an integer >= 1.
        epsilon, relative_epsilon: the ridge, see ``with_ridge``.

    Returns:
        The roots [B, d, d], and the rows that did not converge (their content is undefined).
    """
    regular, bound = with_ridge(matrices, epsilon, relative_epsilon)
    scale = (root + 1) / (2.0 * bound)
    start = _identity(matrices) * power(scale, 1.0 / root)
    found, failed = _iterate(start, regular * scale, root)
    return _symmetric(found), failed


def without_reads(matrices: Tensor, root: int, epsilon: float, relative_epsilon: float) -> Tensor:
    """``coupled_newton`` on an accelerator without a read: the roots [B, d, d], NaN where it did not converge.

    Every matrix takes the iterations that the smallest eigenvalue above the ridge needs. A matrix that has converged
    before stays at the identity but for rounding, which the iteration does not amplify (Guo and Higham 2006, section
    3). Masks would cost five operators in each iteration, and reads a wait in each.
    """
    regular, bound = with_ridge(matrices, epsilon, relative_epsilon)
    scale = (root + 1) / (2.0 * bound)
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    above, driven, found = (1.0 + 1.0 / root) * eye, regular * scale, eye * power(scale, 1.0 / root)
    for _ in range(iterations(root, relative_epsilon, matrices.dtype)):
        step = torch.sub(above, driven, alpha=1.0 / root)
        found, driven = bmm(found, step), bmm(_whole_power(step, root), driven)
    errors = torch.linalg.vector_norm(driven.sub_(eye), dim=(-2, -1), keepdim=True)
    found = bmm(found, torch.sub(eye, driven, alpha=1.0 / root))
    return _symmetric(found).masked_fill_(~(errors < _STALL_BELOW), torch.nan)


def iterations(root: int, ridge: float, dtype: torch.dtype = torch.float32) -> int:
    """Iterations until the smallest eigenvalue has converged, that is ``ridge`` times the largest.

    It grows by (1 + 1/p)^p in each, from (p + 1) / 2 times the ridge; four more are quadratic. A ridge below rounding
    counts as rounding.
    """
    start = 0.5 * (root + 1) * max(ridge, torch.finfo(dtype).eps)
    return max(0, math.ceil(-math.log(start) / (root * math.log1p(1.0 / root)))) + 4


def with_ridge(matrices: Tensor, epsilon: float, relative_epsilon: float) -> tuple[Tensor, Tensor]:
    """A + max(epsilon, relative_epsilon * s) I, and a bound [B, 1, 1] of its largest eigenvalue, s as ``upper_bound``.

    For a matrix without negative eigenvalues this is the regularisation of all solvers, with s in the place of l_max.
    Negative eigenvalues that the ridge does not cover prevent an iteration from converging.
    """
    bound = upper_bound(matrices)
    ridge = (relative_epsilon * bound).clamp_min(epsilon)
    return matrices + ridge * torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device), bound + ridge


def upper_bound(matrices: Tensor) -> Tensor:
    """s = ||A^64||_F^(1/64) of symmetric matrices [B, d, d], as [B, 1, 1]: l_max <= s <= d^(1/128) l_max.

    Both inequalities hold for every spectrum, up to rounding (with |l| in the place of l if some are negative). For
    d = 1,024, s is at most 1.06 l_max, while the Frobenius norm may be 32 l_max. Zero for a zero matrix.
    """
    if matrices.device.type != "cpu":
        return _upper_bound_there(matrices)
    size = matrices.abs().amax(dim=(-2, -1), keepdim=True)  # its square may be out of the dtype's range
    logarithm, power = elementwise(torch.log, size.double()), matrices / size
    for k in range(_SQUARINGS + 1):
        power = bmm(power, power) if k else power
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        logarithm = logarithm + elementwise(torch.log, norm.double()) / 2**k
        power = power / norm
    return torch.where(size == 0, 0.0, elementwise(torch.exp, logarithm).to(matrices.dtype))


def _upper_bound_there(matrices: Tensor) -> Tensor:
    """``upper_bound`` on accelerators: the logarithms of all norms are taken together."""
    norms = matrices.new_empty(_SQUARINGS + 2, len(matrices), 1, 1)
    torch.linalg.vector_norm(matrices, torch.inf, dim=(-2, -1), keepdim=True, out=norms[0])
    size = torch.threshold(norms[0], 0.0, 1.0)
    power = matrices / size
    for k in range(_SQUARINGS + 1):
        power = bmm(power, power) if k else power
        torch.linalg.vector_norm(power, dim=(-2, -1), keepdim=True, out=norms[k + 1])
        if k < _SQUARINGS:
            power = power / norms[k + 1]
    logarithms = norms.double().log_()
    total = logarithms[_SQUARINGS + 1]
    for k in range(_SQUARINGS, 0, -1):  # by Horner's rule, of the norms after the size
        total = torch.add(logarithms[k], total, alpha=0.5)
    total.add_(logarithms[0])
    return torch.where(norms[0] == 0, 0.0, total.exp_().to(matrices.dtype))


def _iterate(roots: Tensor, driven: Tensor, root: int) -> tuple[Tensor, list[int]]:
    """X <- X E and M <- E^root M for each matrix until its M is the identity; X, and the rows that did not converge.

    With e = ||M - I||_F, the next step's error is O(e^2). So a matrix whose e is near the root of the rounding unit
    takes one more step and is done. So does one whose e is small but was not even halved: only rounding keeps it there.
    Converged matrices are removed from the batch.
    """
    d, dtype = roots.shape[-1], roots.dtype
    tolerance = max(torch.finfo(dtype).eps ** 0.5, 4.0 * d * torch.finfo(dtype).eps)
    hopeless = 4.0 * (root + 1) * d**0.5
    out = torch.full_like(roots, torch.nan)
    rows, before = list(range(len(roots))), [torch.inf] * len(roots)
    failed: list[int] = []
    for _ in range(MAX_ITERATIONS):
        if not rows:
            break
        residual = driven - torch.eye(d, dtype=dtype, device=roots.device)
        errors = torch.linalg.matrix_norm(residual).tolist()
        step = torch.eye(d, dtype=dtype, device=roots.device) - residual / root
        stalled = [last <= _STALL_BELOW and error > last / 2 for error, last in zip(errors, before, strict=True)]
        done = [n for n, error in enumerate(errors) if error <= tolerance or (stalled[n] and error < _STALL_BELOW)]
        going = [n for n, error in enumerate(errors) if error < hopeless and n not in done]
        failed += [rows[n] for n in range(len(rows)) if not errors[n] < hopeless]
        if done:
            out[[rows[n] for n in done]] = bmm(roots[done], step[done])
        if len(going) < len(rows):
            roots, driven, step = roots[going], driven[going], step[going]
            rows, errors = [rows[n] for n in going], [errors[n] for n in going]
        if rows:
            roots, driven, before = bmm(roots, step), bmm(_whole_power(step, root), driven), errors
    return out, sorted(failed + rows)


def _whole_power(matrices: Tensor, exponent: int) -> Tensor:
    """A^exponent for an exponent >= 1, by squarings."""
    if exponent == 1:
        return matrices
    square = _whole_power(bmm(matrices, matrices), exponent // 2)
    return bmm(matrices, square) if exponent % 2 else square


def _identity(matrices: Tensor) -> Tensor:
    eye = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return eye.expand(matrices.shape).contiguous()


def _symmetric(stack: Tensor) -> Tensor:
    return (stack + stack.mT) / 2.0
