"""Masks a step in which a gradient is not finite, so that it changes nothing.

All ranks agree on the flag. On the CPU it is read at once, and a step that is accepted gets no ``FoundInf`` at all. On
an accelerator a read would wait for the device, so the flag masks the step on the device. Gradients become zero and
decays become one, so accumulators keep their values to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor


class FoundInf:
    """The flag of one `step()` call on one device, for tensors of one dtype.

    Args:
        flag: 0-d bool tensor; True if the step is rejected.
        dtype: dtype of the scalars that `keep` and `scale` return.
        read: returns the flag on the CPU, if that waits for less than a copy of ``flag``, which waits for all that
            the device has queued.
    """

    def __init__(self, flag: Tensor, dtype: torch.dtype, read: Callable[[], bool] | None = None) -> None:
        self._flag = flag
        self._dtype = dtype
        self._read = read
        self._keeps: dict[tuple[float, torch.dtype], Tensor] = {}
        self._scales: dict[float, Tensor] = {}

    @cached_property
    def rejected(self) -> bool:
        """The flag on the CPU; the first read waits for the device."""
        return bool(self._flag) if self._read is None else self._read()

    @cached_property
    def as_float(self) -> Tensor:
        """The flag as torch's fused optimizers know it: float32, 1 if nothing may change."""
        return self._flag.float()

    def mask_(self, tensors: Sequence[Tensor]) -> None:
        """Set what belongs to a rejected step, gradients or truth values, to zero or false, in place."""
        for tensor in tensors:
            tensor.masked_fill_(self._flag, 0)

    def keep(self, decay: float, dtype: torch.dtype | None = None) -> Tensor:
        """``decay``, or 1 if the step is rejected, as a 0-d tensor, in the dtype of what it multiplies."""
        dtype = dtype or self._dtype
        if (decay, dtype) not in self._keeps:
            scalar = torch.full((), decay, dtype=dtype, device=self._flag.device)
            self._keeps[decay, dtype] = scalar.masked_fill_(self._flag, 1.0)
        return self._keeps[decay, dtype]

    def scale(self, factor: float | Tensor) -> Tensor:
        """``factor``, or 0 if the step is rejected, as a 0-d tensor, which must not be changed."""
        device = self._flag.device
        if isinstance(factor, Tensor):
            return factor.detach().to(device=device, dtype=self._dtype).reshape(()).masked_fill(self._flag, 0.0)
        if factor not in self._scales:
            scalar = torch.full((), factor, dtype=self._dtype, device=device)
            self._scales[factor] = scalar.masked_fill_(self._flag, 0.0)
        return self._scales[factor]
