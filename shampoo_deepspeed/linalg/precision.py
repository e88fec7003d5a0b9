"""Arithmetic that depends on values alone: neither on a script's precision switches nor on places in memory.

*Switches.* Float32 products are computed in float32, independent of the global TF32 and autocast switches. A caller
may ask for less, product by product (``rounded``, ``tensor_float_32``); the switches never do.

*Places.* Libraries do not promise that a result is the same everywhere in memory. LAPACK kernels, and MKL's products
on AMD's CPUs, take other paths for unaligned matrices, such as matrices of odd size inside a batch. Torch's vectorised
loops compute the last elements of a tensor, which fill no vector register, by another formula (``pow``, the fused
Adam). So on the CPU, matrices are decomposed one by one, each in memory of its own (``inverse_root.decomposed``).
Products use aligned matrices (``mode_products.bmm``), and elements at the end of a tensor are computed in a padded
copy.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
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
    step = object()
    try:
        SWITCHES.begin(step)
        yield
    finally:
        SWITCHES.end(step)


class _Switches:
    """The precision switches of the process, while any thread computes in full precision.

    They belong to all threads, so the first thread that begins saves them, and the last one that ends restores them.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._used = False
        self._within: set[object] = set()
        self._restore: list[Callable[[], None]] = []
        self._older: str | None = None

    def begin(self, step: object) -> None:
        """Set the switches, if no other step has done so."""
        with self._lock:
            self._used = True
            self._within.add(step)  # before anything is set, so that an interrupt finds it
            if len(self._within) == 1:
                self._set()

    def end(self, step: object) -> None:
        """Restore the switches if this was the last step; a step that has not begun ends nothing."""
        with self._lock:
            self._within.discard(step)
            while not self._within and self._restore:
                self._restore[-1]()
                self._restore.pop()

    @contextmanager
    def lowered(self) -> Iterator[bool]:
        """Products in TF32 where the device has it, while no other step is under way; whether that is so.

        The lock is held as long, so a step that begins on another thread waits until these products are launched.
        """
        with self._lock:
            alone = len(self._within) == 1
            if alone:
                self._set_products("tf32", "high")
            try:
                yield alone
            finally:
                if alone:
                    self._set_products("ieee", "highest")

    def after_fork(self) -> None:
        """In a forked process, in which only this thread goes on: restore what other threads have set.

        If the parent has taken steps, the threads of its OpenMP do not exist here, and GNU's would wait for them for
        ever. One thread works, which is also what torch gives the workers of a DataLoader.
        """
        self._lock = threading.RLock()
        self._within.clear()
        self.end(self)
        if self._used:
            torch.set_num_threads(1)

    def _set(self) -> None:
        if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch 2.8 has only the older switch
            before = torch.get_float32_matmul_precision()
            self._restore.append(lambda: torch.set_float32_matmul_precision(before))
            torch.set_float32_matmul_precision("highest")
            return
        for backend in _backends():
            self._restore.append(partial(_set_precision, backend, backend.fp32_precision))
        # Torch refuses to read the older switch where only the newer ones were changed, and its tuner of products
        # (PYTORCH_TUNABLEOP_ENABLED) reads it. So the older one is changed too, unless a script has mixed them itself.
        self._older = _older_precision()
        if self._older not in (None, "highest"):
            self._restore.append(partial(torch.set_float32_matmul_precision, self._older))
            torch.set_float32_matmul_precision("highest")
        for backend in _backends():
            backend.fp32_precision = "ieee"

    def _set_products(self, precision: str, older: str) -> None:
        """The precision of products within a step, by the name of the backends or by the older switch's."""
        if self._older is not None or not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            torch.set_float32_matmul_precision(older)  # it sets the backends too
            return
        for backend in _backends():
            backend.fp32_precision = precision


def _older_precision() -> str | None:
    """The older switch of the precision of products; None if it cannot be read."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def _backends() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]


def _set_precision(backend: Any, precision: str) -> None:
    backend.fp32_precision = "none"  # it now reads as the inherited torch.backends.fp32_precision
    if backend.fp32_precision != precision:
        backend.fp32_precision = precision


SWITCHES = _Switches()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=SWITCHES.after_fork)


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


# NVIDIA's devices whose float64 is at most half as fast as float32; that of others is 1/32 or 1/64 as fast.
WIDE_CAPABILITIES = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}


def fast_float64(device: torch.device) -> bool:
    """Whether a device's float64 is of use; True if that is not known, as for devices of other makers."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return tuple(torch.cuda.get_device_capability(device)) in WIDE_CAPABILITIES


# The bits that are dropped from a significand, by precision: TF32 keeps 10 of float32's 23 bits, bfloat16 keeps 7.
_KEPT = {"high": 10, "medium": 7}
_FORMATS = {torch.float32: (torch.int32, 23), torch.float64: (torch.int64, 52)}


def rounded(values: Tensor, precision: str) -> Tensor:
    """The values with fewer bits, in their own dtype and range: operands of a product of this precision.

    A product of two rounded numbers is exact in float32. So a float32 product of rounded operands is a product in TF32
    ("high") or in bfloat16 ("medium") with float32 accumulation, on every device. Ties go to even.

    Args:
        values: float32 or float64; narrower dtypes are returned as they are.
        precision: ``"high"`` or ``"medium"``.
    """
    if values.dtype not in _FORMATS:
        return values
    integer, bits = _FORMATS[values.dtype]
    dropped = bits - _KEPT[precision]
    raw = values.view(integer)
    last = (raw >> dropped) & 1
    out = ((raw + (last + ((1 << (dropped - 1)) - 1))) & -(1 << dropped)).view(values.dtype)
    return torch.where(values.isfinite(), out, values)  # a carry would make an infinity or a zero of NaN


@contextmanager
def tensor_float_32() -> Iterator[bool]:
    """Compute an accelerator's float32 products in TF32; whether that is so.

    Only within ``full_precision``. It is not so while a step is under way on another thread, because the switch belongs
    to the process. The caller then rounds operands itself. Devices without TF32 compute in float32.
    """
    with SWITCHES.lowered() as on:
        yield on


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
