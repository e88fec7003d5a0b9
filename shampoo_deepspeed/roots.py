"""Inverse p-th roots of stacks of symmetric positive semi-definite matrices. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.metrics import note_spectrum


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Float32 products in float32, whatever the global TF32 or autocast switches say; restored on exit.

    Inverse roots amplify rounding: with TF32 products Newton iterations diverge and eigenvalues below 1e-3 of the
    largest are noise, and a switch that the host flips for its own matmuls must not change the optimizer.
    """
    with _ieee_products(), torch.autocast(device_type=device_type, enabled=False):
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.8 has the one older switch only
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    matmuls: list[Any] = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    saved = [backend.fp32_precision for backend in matmuls]
    try:
        for backend in matmuls:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(matmuls, saved, strict=True):
            backend.fp32_precision = "none"  # reads as what it inherits now: torch.backends.fp32_precision
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


def inverse_root(
    matrices: Tensor, root: float, epsilon: float, relative_epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, list[int]]:
    """A^(-1/root) of each matrix of a stack by eigendecomposition (arXiv 2309.06497, section 4.1).

    Eigenvalues are regularised by ``l - min(l_min, 0) + max(epsilon, relative_epsilon * l_max)``; one that is still
    zero gets root 0. A matrix whose eigendecomposition fails or is not finite is tried again in float64.

    Args:
        matrices: [B, d, d], symmetric, float32 or wider (narrower ones are widened to float32).
        root: p > 0.
        epsilon, relative_epsilon: absolute and relative regularisation, >= 0.
        dtype: dtype of the result.

    Returns:
        The roots [B, d, d], and the rows that failed even in float64 (their content is undefined).
    """
    work = matrices if matrices.dtype == torch.float64 else matrices.float()
    roots = _stack_root(work, root, epsilon, relative_epsilon)
    suspects = range(len(work)) if roots is None else _non_finite(roots)
    if roots is None:
        roots = torch.empty_like(work)
    failed = []
    for row in suspects:
        retried = _stack_root(work[row : row + 1].double(), root, epsilon, relative_epsilon)
        narrow = None if retried is None else retried.to(roots.dtype)  # which may overflow
        if narrow is None or _non_finite(narrow):
            failed.append(row)
        else:
            roots[row] = narrow[0]
    return roots.to(dtype), failed


def _stack_root(matrices: Tensor, root: float, epsilon: float, relative_epsilon: float) -> Tensor | None:
    """The roots, or None where LAPACK or cuSOLVER reports that a matrix did not converge."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except torch.linalg.LinAlgError:
        return None
    except RuntimeError as error:
        if "cusolver" not in str(error).lower():
            raise
        return None  # some cuSOLVER versions say so instead of LinAlgError
    values = regularised(values, epsilon, relative_epsilon)
    note_spectrum(values)
    scales = torch.where(values > 0, values.clamp_min(torch.finfo(values.dtype).tiny).pow(-1.0 / root), 0.0)
    return (vectors * scales.unsqueeze(-2)) @ vectors.mT


def regularised(values: Tensor, epsilon: float, relative_epsilon: float) -> Tensor:
    """The one regularisation of all solvers, on eigenvalues [B, d] in ascending order."""
    lowest, highest = values[..., :1], values[..., -1:]
    return values - lowest.clamp_max(0.0) + (relative_epsilon * highest).clamp_min(epsilon)


def _non_finite(stack: Tensor) -> list[int]:
    finite = torch.isfinite(stack).all(dim=-1).all(dim=-1)
    return [row for row, good in enumerate(finite.tolist()) if not good]
