"""Whether a step is accepted, decided on the device: a rejected step changes nothing, without a read on the CPU.

A non-finite gradient on any rank rejects the step on all ranks. The flag masks the update where it is computed:
gradients become zero and decays become one, so that accumulators keep their values to the bit. The CPU reads the
flag one step later, when it is long there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor


class FoundInf:
    """One `step()` call's flag on one device, for tensors of one dtype.

    Args:
        rejected: 0-d bool tensor.
        dtype: dtype of the scalars that `keep` and `scale` give.
        read: gives the flag on the CPU once it is known, where that waits for less than a copy of ``rejected`` would:
            a copy made now is behind all that the device has to do so far.
    """

    def __init__(self, rejected: Tensor, dtype: torch.dtype, read: Callable[[], bool] | None = None) -> None:
        self._flag = rejected
        self._dtype = dtype
        self._read = read
        self._keeps: dict[tuple[float, torch.dtype], Tensor] = {}

    @cached_property
    def rejected(self) -> bool:
        """The flag on the CPU; the first read waits for the device."""
        return bool(self._flag) if self._read is None else self._read()

    @cached_property
    def as_float(self) -> Tensor:
        """The flag as torch's fused optimizers know it: float32, 1 where nothing may change."""
        return self._flag.float()

    def clean_(self, gradients: Sequence[Tensor]) -> None:
        """Zero the gradients of a rejected step in place."""
        if self._accepted_on_host():
            return
        for gradient in gradients:
            gradient.masked_fill_(self._flag, 0.0)

    def cleaned(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """The gradients, zero where the step is rejected; on the CPU those of an accepted one are the same tensors."""
        if self._accepted_on_host():
            return list(gradients)
        return [g.masked_fill(self._flag, 0.0) for g in gradients]

    def _accepted_on_host(self) -> bool:
        """On the CPU nothing waits for a read of the flag, and a mask costs as much as the update itself."""
        return self._flag.device.type == "cpu" and not self.rejected

    def keep(self, decay: float, dtype: torch.dtype | None = None) -> Tensor:
        """``decay``, or 1 where the step is rejected, as a 0-d tensor, in the dtype of what it multiplies."""
        dtype = dtype or self._dtype
        if (decay, dtype) not in self._keeps:
            scalar = torch.full((), decay, dtype=dtype, device=self._flag.device)
            self._keeps[decay, dtype] = scalar.masked_fill_(self._flag, 1.0)
        return self._keeps[decay, dtype]

    def keep_number(self, decay: float) -> float | None:
        """What `keep` gives, as a number that a kernel can take with others; None where reading it would wait."""
        if self._flag.device.type != "cpu":
            return None
        return 1.0 if self.rejected else decay

    def scale_number(self, factor: float | Tensor) -> float | None:
        """What `scale` gives, as a number; None where reading it would wait, as for a factor on an accelerator."""
        if self._flag.device.type != "cpu" or isinstance(factor, Tensor):
            return None
        return 0.0 if self.rejected else factor

    def scale(self, factor: float | Tensor) -> Tensor:
        """``factor``, or 0 where the step is rejected, as a 0-d tensor."""
        device = self._flag.device
        if isinstance(factor, Tensor):
            scalar = factor.detach().to(device=device, dtype=self._dtype).reshape(())
        else:
            scalar = torch.full((), factor, dtype=self._dtype, device=device)
        return scalar.masked_fill(self._flag, 0.0)


class StepFlags:
    """Flags on their way to the CPU, to be read at the next step.

    Args:
        flags: 1-D tensor; on an accelerator it is copied aside at once and nothing waits before ``read``.
    """

    def __init__(self, flags: Tensor) -> None:
        self._event: torch.Event | None = None
        if flags.device.type == "cpu":
            self._flags = flags.clone()
            return
        self._flags = torch.empty(flags.shape, dtype=flags.dtype, device="cpu", pin_memory=True)
        self._flags.copy_(flags, non_blocking=True)
        self._event = torch.Event(flags.device)
        self._event.record(torch.accelerator.current_stream(flags.device))

    def read(self) -> list[float]:
        """The values; waits for that copy only, not for what was queued since."""
        if self._event is not None:
            self._event.synchronize()
        values: list[float] = self._flags.tolist()
        return values
