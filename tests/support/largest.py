"""The largest tensor that is made within a context."""

from __future__ import annotations

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Largest(TorchDispatchMode):
    """Notes the largest tensor that is made, in bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not any(isinstance(a, Tensor) and a.data_ptr() == out.data_ptr() for a in args):
            self.nbytes = max(self.nbytes, out.nbytes)
        return out
