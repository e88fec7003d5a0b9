"""Counts what the simulated device would do: FLOPs of products and factorizations, bytes read and written, launches."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from tests.support import simulated_device
from tests.support.simulated_device import NOT_COUNTED, OnDevice

PRODUCTS = ("bmm", "baddbmm_", "baddbmm", "mm")


@dataclass
class Work:
    """What ran.

    Attributes:
        flops: of products, by the bits that their operands keep: "highest", "high" or "medium".
        factorizations: FLOPs of Cholesky factors (d^3 / 3) and triangular solves (d^2 n).
        decomposed: d^3 of each eigendecomposition, added up.
        product_bytes: operands and results of products.
        other_bytes: tensors that all other operators read or write.
        launches: operators that launch work.
        reads: values or shapes that the CPU waited for.
    """

    flops: Counter[str] = field(default_factory=Counter)
    factorizations: float = 0.0
    decomposed: float = 0.0
    product_bytes: float = 0.0
    other_bytes: float = 0.0
    launches: int = 0
    reads: int = 0
    by_name: Counter[str] = field(default_factory=Counter)


@contextmanager
def counted() -> Iterator[Work]:
    """Count all operators on the device until the end."""
    found, kept = Work(), simulated_device.run
    reads = len(simulated_device.NOTED.reads)

    def run(func: Any, args: Any, kwargs: Any) -> Any:
        out = kept(func, args, kwargs)
        here = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, OnDevice)]
        name = func._schema.name
        if here and name not in NOT_COUNTED and not func.is_view:
            _add(found, name.partition("::")[2], args, list({id(t): t for t in here}.values()))
        return out

    simulated_device.run = run
    try:
        yield found
    finally:
        simulated_device.run = kept
        found.reads = len(simulated_device.NOTED.reads) - reads


def _add(found: Work, name: str, args: Any, tensors: list[Tensor]) -> None:
    found.launches += 1
    found.by_name[name] += 1
    nbytes = sum(math.prod(t.shape) * t.dtype.itemsize for t in tensors)
    if name in PRODUCTS:
        left, right = (args[1], args[2]) if name.startswith("baddbmm") else (args[0], args[1])
        found.flops[_precision(left)] += 2 * left.numel() * right.shape[-1]
        found.product_bytes += nbytes
        return
    found.other_bytes += nbytes
    if name == "linalg_cholesky_ex":
        found.factorizations += args[0].numel() * args[0].shape[-1] / 3
    elif name == "linalg_solve_triangular":
        found.factorizations += args[1].numel() * args[0].shape[-1]
    elif name in ("_linalg_eigh", "linalg_eigh"):
        found.decomposed += args[0].numel() * args[0].shape[-1]
    elif "linalg" in name and "norm" not in name:
        raise AssertionError(f"{name} is not counted")


def _precision(operand: Tensor) -> str:
    if operand.dtype == torch.bfloat16:
        return "medium"
    if operand.dtype == torch.float64:
        return "float64"
    return "high" if simulated_device._in_tf32() else "highest"
