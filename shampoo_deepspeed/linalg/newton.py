"""Inverse p-th roots by matrix products alone: coupled Newton and Newton-DB iterations on stacks. Pure functions.

For devices on which an eigendecomposition is slow and products are fast. Both iterations start from a matrix M with
eigenvalues in (0, (p + 1) / 2] and drive it to the identity by ``E = I - (M - I) / p``. Each matrix of a stack stops
independently; one that does not converge is left to the caller.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from shampoo_deepspeed.linalg.mode_products import bmm
from shampoo_deepspeed.linalg.precision import elementwise, power

MAX_ITERATIONS = 100
DB_ROOTS = (1, 2, 4, 8)  # those that newton_db can compute, by repeated square roots
_SQUARINGS = 6
_STALL_BELOW = 1e-2
State: TypeAlias = tuple[Tensor, Tensor]


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

    def advance(state: State, step: Tensor) -> State:
        return bmm(state[0], step), bmm(_whole_power(step, root), state[1])

    (found, _), failed = _iterate((start, regular * scale), root, lambda state: state[1], advance)
    return _symmetric(found), failed


def newton_db(matrices: Tensor, root: int, epsilon: float, relative_epsilon: float) -> tuple[Tensor, list[int]]:
    """A^(-1/root) by square roots of square roots, each by the product form of Denman and Beavers' iteration.

    Y <- Y E and Z <- E Z with M = Z Y, from Y = A / s and Z = I, give A^(1/2) and A^(-1/2) (Higham, Functions of
    Matrices, equation 6.35).

    Args:
        root: 1, 2, 4 or 8. The other arguments and the result are as for ``coupled_newton``.
    """
    regular, bound = with_ridge(matrices, epsilon, relative_epsilon)
    square, failed = regular / bound, set()
    inverse = square
    for _ in range(max(1, root.bit_length() - 1)):
        (square, inverse), wrong = _iterate(
            (square, _identity(matrices)),
            2,
            lambda state: bmm(state[1], state[0]),
            lambda state, step: (bmm(state[0], step), bmm(step, state[1])),
        )
        square = _symmetric(square)
        failed.update(wrong)
    if root == 1:
        inverse = bmm(inverse, inverse)
    return _symmetric(inverse) * power(bound, -1.0 / root), sorted(failed)


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
    size = matrices.abs().amax(dim=(-2, -1), keepdim=True)  # its square may be out of the dtype's range
    logarithm, power = elementwise(torch.log, size.double()), matrices / size
    for k in range(_SQUARINGS + 1):
        power = bmm(power, power) if k else power
        norm = torch.linalg.matrix_norm(power, keepdim=True)
        logarithm = logarithm + elementwise(torch.log, norm.double()) / 2**k
        power = power / norm
    return torch.where(size == 0, 0.0, elementwise(torch.exp, logarithm).to(matrices.dtype))


def _iterate(
    state: State, root: int, product: Callable[[State], Tensor], advance: Callable[[State, Tensor], State]
) -> tuple[State, list[int]]:
    """Advance each matrix until its M is the identity; return the state and the rows that did not converge.

    With e = ||M - I||_F, the next step's error is O(e^2). So a matrix whose e is near the root of the rounding unit
    takes one more step and is done. So does one whose e is small but was not even halved: only rounding keeps it there.
    Converged matrices are removed from the batch.
    """
    d, dtype = state[0].shape[-1], state[0].dtype
    tolerance = max(torch.finfo(dtype).eps ** 0.5, 4.0 * d * torch.finfo(dtype).eps)
    hopeless = 4.0 * (root + 1) * d**0.5
    out = torch.full_like(state[0], torch.nan), torch.full_like(state[1], torch.nan)
    rows, before = list(range(len(state[0]))), [torch.inf] * len(state[0])
    failed: list[int] = []
    for _ in range(MAX_ITERATIONS):
        if not rows:
            break
        residual = product(state) - torch.eye(d, dtype=dtype, device=state[0].device)
        errors = torch.linalg.matrix_norm(residual).tolist()
        step = torch.eye(d, dtype=dtype, device=state[0].device) - residual / root
        stalled = [last <= _STALL_BELOW and error > last / 2 for error, last in zip(errors, before, strict=True)]
        done = [n for n, error in enumerate(errors) if error <= tolerance or (stalled[n] and error < _STALL_BELOW)]
        going = [n for n, error in enumerate(errors) if error < hopeless and n not in done]
        failed += [rows[n] for n in range(len(rows)) if not errors[n] < hopeless]
        if done:
            last = advance((state[0][done], state[1][done]), step[done])
            for whole, part in zip(out, last, strict=True):
                whole[[rows[n] for n in done]] = part
        if len(going) < len(rows):
            state, step = (state[0][going], state[1][going]), step[going]
            rows, errors = [rows[n] for n in going], [errors[n] for n in going]
        if rows:
            state, before = advance(state, step), errors
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
