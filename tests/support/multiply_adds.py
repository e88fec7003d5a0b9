"""Counts the multiply-adds of products and factorizations, whatever code runs them."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class MultiplyAdds(TorchDispatchMode):
    """Counts multiply-adds of products, Cholesky factors (d^3 / 6) and triangular solves (d^3 / 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0.0
        self.decompositions: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("bmm", "mm"):
            self.count += args[0].numel() * args[1].shape[-1]
        elif name == "baddbmm":
            self.count += args[1].numel() * args[2].shape[-1]
        elif name == "linalg_cholesky_ex":
            self.count += args[0].numel() * args[0].shape[-1] / 6
        elif name == "linalg_solve_triangular":
            self.count += args[1].numel() * args[0].shape[-1] / 2
        elif "linalg" in name and "norm" not in name:
            self.decompositions.append(name)
        return func(*args, **(kwargs or {}))
