"""The precision of matrix products: float32 means float32, whatever switches a script has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Float32 products in float32, whatever the global TF32 or autocast switches say; restored on exit.

    Inverse roots amplify rounding: with TF32 products Newton iterations diverge and eigenvalues below 1e-3 of the
    largest are noise, and a switch that the framework flips for its own matmuls must not change the optimizer.
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


_beside: ContextVar[bool] = ContextVar("beside", default=False)


@contextmanager
def beside_the_forward() -> Iterator[None]:
    """For a thread whose products must not depend on the switches of ``full_precision`` nor change them.

    They belong to the whole process, so that the forward of another thread would see a change, and a change by that
    thread would be seen here. No switch reaches float64: what is a product in float32 elsewhere is one in float64 here
    (``product``, and the iterations). Decompositions read no switch, and autocast belongs to the thread.
    """
    token = _beside.set(True)
    try:
        yield
    finally:
        _beside.reset(token)


def no_switch_counts() -> bool:
    """Whether this is within ``beside_the_forward``."""
    return _beside.get()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product; in float64 within ``beside_the_forward``, rounded to the dtype of ``left``."""
    return (left.double() @ right.double()).to(left.dtype) if _beside.get() else left @ right
