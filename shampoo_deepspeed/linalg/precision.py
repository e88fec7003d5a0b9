"""Arithmetic that depends on values alone: neither on a script's precision switches nor on places in memory.

*Switches.* Float32 products are computed in float32, independent of the global TF32 and autocast switches.

*Places.* Libraries do not promise that a result is the same everywhere in memory. LAPACK kernels, and MKL's products
on AMD's CPUs, take other paths for unaligned matrices, such as matrices of odd size inside a batch. Torch's vectorised
loops compute the last elements of a tensor, which fill no vector register, by another formula (``pow``, the fused
Adam). So on the CPU, matrices are decomposed one by one, each in memory of its own (``inverse_root.decomposed``).
Products use aligned matrices (``mode_products.bmm``), and elements at the end of a tensor are computed in a padded
copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# A multiple of the elements that torch's loops process at a time, on any CPU: two vector registers of 16 float32 with
# AVX-512, of 64 with the widest SVE.
LANES = 128
# Torch splits tensors of 32,768 elements or more among threads, and not at multiples of vector registers.
UNDIVIDED = 1 << 14
# Between these bounds, a norm whose squares were summed in the dtype has lost nothing to overflow or underflow. Squares
# below the smallest number are lost, but a billion of them are only 1e-9 of the lower bound's square.
ACCURATE_NORMS = {
    dtype: (math.sqrt(torch.finfo(dtype).tiny) * 2.0**30, math.sqrt(torch.finfo(dtype).max) / 2.0)
    for dtype in (torch.float32, torch.float64)
}


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Compute float32 products in float32, independent of the global TF32 and autocast switches; restored on exit.

    Inverse roots amplify rounding: with TF32 products Newton iterations diverge, and eigenvalues below 1e-3 of the
    largest are noise. A switch that the framework flips for its own matmuls must not change the optimizer.
    """
    with _ieee_products(), torch.autocast(device_type=device_type, enabled=False):
        yield


@contextmanager
def _ieee_products() -> Iterator[None]:
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.8 has only the older switch
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
            backend.fp32_precision = "none"  # it now reads as the inherited torch.backends.fp32_precision
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


INDEPENDENT: ContextVar[bool] = ContextVar("independent", default=False)


@contextmanager
def independent_of_switches() -> Iterator[None]:
    """Make this thread's products independent of the switches of ``full_precision``, without changing them.

    The switches belong to the whole process: a change here would affect another thread's forward, and the other way
    round. They do not affect float64, so products that are otherwise in float32 are in float64 here
    (``mode_products.product``, and the Newton iterations). Decompositions read no switch, and autocast belongs to the
    thread.
    """
    token = INDEPENDENT.set(True)
    try:
        yield
    finally:
        INDEPENDENT.reset(token)


def no_switch_counts() -> bool:
    """Whether this is within ``independent_of_switches``."""
    return INDEPENDENT.get()


def elementwise(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """``function(values)``, such that each element of the result depends on its own element of ``values`` alone.

    Args:
        function: an element-wise function of tensors that keeps shape and dtype.
    """
    if values.device.type != "cpu" or not values.numel():
        return function(values)
    flat = values.reshape(-1)
    padded = flat.new_ones(-(-len(flat) // LANES) * LANES)
    padded[: len(flat)] = flat
    parts = [function(part) for part in padded.split(UNDIVIDED)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[: len(flat)].view(values.shape)


def power(values: Tensor, exponent: float) -> Tensor:
    """``values ** exponent``, element by element, by ``elementwise``."""
    return elementwise(lambda part: part.pow(exponent), values)


def row_means(rows: Tensor) -> Tensor:
    """The mean of each row of [B, d], as [B, 1]; it depends on that row's values alone.

    ``Tensor.mean`` divides a long row among threads if it is the only one. Here the halves of all rows are added, until
    one element is left: an addition is rounded alike at any place.
    """
    count = rows.shape[-1]
    while rows.shape[-1] > 1:
        half = rows.shape[-1] // 2
        rows = torch.cat([rows[:, :half] + rows[:, half : 2 * half], rows[:, 2 * half :]], dim=-1)
    return rows / count


def whole_registers(*lists: Sequence[Tensor]) -> tuple[list[list[Tensor]], list[tuple[Tensor, Tensor]]]:
    """Prepare tensors for a kernel that works in place, such that each element's result depends on that element alone.

    On the CPU, each tensor becomes a flat view of the elements that fill vector registers, and a padded copy of the
    others. The caller copies the latter back.

    Args:
        lists: lists of contiguous tensors; those at the same place of each list have one size.

    Returns:
        As many lists for the kernel, and the (target, copy) pairs to copy back.
    """
    if not lists[0] or lists[0][0].device.type != "cpu":
        return [list(tensors) for tensors in lists], []
    out: list[list[Tensor]] = [[] for _ in lists]
    copies = []
    for place, like in enumerate(lists[0]):
        numel = like.numel()
        full = numel // LANES * LANES
        for tensors, made in zip(lists, out, strict=True):
            flat = tensors[place].view(-1)
            if full:
                made.append(flat[:full])
            if full < numel:
                padded = flat.new_zeros(LANES)
                end = padded[: numel - full].copy_(flat[full:])
                copies.append((flat[full:], end))
                made.append(padded)
    return out, copies
