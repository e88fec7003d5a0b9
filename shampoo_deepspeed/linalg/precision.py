"""Arithmetic that depends on values alone: neither on a script's precision switches nor on places in memory.

*Switches.* Float32 products are computed in float32, independent of the global TF32 and autocast switches.

*Places.* Libraries do not promise that a result is the same everywhere in memory. LAPACK kernels, and MKL's products
on AMD's CPUs, take other paths for unaligned matrices, such as matrices of odd size inside a batch. Torch's vectorised
loops compute the last elements of a tensor, which fill no vector register, by another formula (``pow``, the fused
Adam). So on the CPU, matrices are decomposed one by one, each in memory of its own (``inverse_root.decomposed``).
Products use aligned matrices (``bmm``), and elements at the end of a tensor are computed in a padded copy.
"""

from __future__ import annotations

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
# Products of one size and dtype are bitwise equal if all their matrices begin at multiples of this many bytes.
ALIGNMENT = 64


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


_independent: ContextVar[bool] = ContextVar("independent", default=False)


@contextmanager
def independent_of_switches() -> Iterator[None]:
    """Make this thread's products independent of the switches of ``full_precision``, without changing them.

    The switches belong to the whole process: a change here would affect another thread's forward, and the other way
    round. They do not affect float64, so products that are otherwise in float32 are in float64 here (``product``, and
    the Newton iterations). Decompositions read no switch, and autocast belongs to the thread.
    """
    token = _independent.set(True)
    try:
        yield
    finally:
        _independent.reset(token)


def no_switch_counts() -> bool:
    """Whether this is within ``independent_of_switches``."""
    return _independent.get()


def product(left: Tensor, right: Tensor) -> Tensor:
    """``bmm``; in float64 within ``independent_of_switches``, rounded to the dtype of ``left``."""
    return bmm(left.double(), right.double()).to(left.dtype) if _independent.get() else bmm(left, right)


def bmm(left: Tensor, right: Tensor) -> Tensor:
    """Products [B, m, n] of stacks [B, m, k] and [B, k, n], each of which depends on its two matrices alone.

    On the CPU, matrices that are not aligned in their stack are multiplied in padded copies. Vectors are multiplied as
    matrices of two columns, because one matrix-vector product uses another routine than a batch of them.
    """
    if left.device.type != "cpu":
        return torch.bmm(left, right)
    if left.shape[1] == 1 and right.shape[2] > 1:
        return bmm(right.mT, left.mT).mT
    if right.shape[2] == 1:
        return bmm(left, torch.cat([right, torch.zeros_like(right)], dim=2))[..., :1].contiguous()
    left, right = aligned(left), aligned(right)
    if aligned_rows(left.shape[1] * right.shape[2], left.dtype):
        return torch.bmm(left, right)
    out = _padded(left, left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=out).contiguous()


def aligned_rows(numel: int, dtype: torch.dtype) -> bool:
    """Whether consecutive matrices of ``numel`` elements are all aligned if the first one is."""
    return numel * dtype.itemsize % ALIGNMENT == 0


def aligned(stack: Tensor) -> Tensor:
    """The stack, or a copy of it, in which each matrix begins at a multiple of ``ALIGNMENT`` bytes.

    Matrices that are stored transposed stay so in the copy.
    """
    stride = stack.stride(0) * stack.element_size() if len(stack) > 1 else 0
    if (stack.data_ptr() | stride) % ALIGNMENT == 0:
        return stack
    if stack.stride(1) == 1 and stack.stride(2) != 1:
        return aligned(stack.mT).mT
    return _padded(stack, stack.shape[1], stack.shape[2]).copy_(stack)


def _padded(like: Tensor, rows: int, columns: int) -> Tensor:
    """An uninitialised stack of aligned matrices, each of which is contiguous."""
    numel, unit = rows * columns, ALIGNMENT // like.element_size()
    flat = like.new_empty(len(like), -(-numel // unit) * unit)
    return flat[:, :numel].unflatten(1, (rows, columns))


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
