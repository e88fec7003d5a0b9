"""Helpers for tests of background refreshes: optimizers, their pending blocks, and a wrapper around compute()."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.algorithm.background import _executor
from shampoo_deepspeed.algorithm.preconditioners.refresh_result import RefreshResult
from shampoo_deepspeed.algorithm.preconditioners.shampoo import KLShampooPreconditioner, ShampooPreconditioner
from shampoo_deepspeed.algorithm.preconditioners.soap import SOAPPreconditioner
from tests.support.stepping import drive, parameter, shampoo

FREQUENCY = 4
FORMS: dict[str, dict[str, Any]] = {
    "shampoo": {"preconditioner": "shampoo"},
    "kl_shampoo": {},
    "kept_bases": {"preconditioner": "shampoo", "refresh_tolerance": 0.5},
    "newton": {"preconditioner": "shampoo", "solver": "coupled_newton", "relative_epsilon": 1e-3},
    "soap": {"preconditioner": "soap"},
    "soap_tolerance": {"preconditioner": "soap", "refresh_tolerance": 0.5, "grafting": "adam"},
    "qr": {"solver": "qr"},
    "kl_soap": {"preconditioner": "kl_soap"},
    "soap_muon": {"preconditioner": "soap_muon"},
    "soap_eigh": {"preconditioner": "soap", "solver": "eigh"},
    "every_step": {"precondition_frequency": 1},
    "memory_half": {"memory": "half"},
    "soap_bfloat16": {"preconditioner": "soap", "factor_format": "bfloat16", "root_format": "bfloat16"},
    "soap_every_step": {"preconditioner": "soap", "precondition_frequency": 1},
}
Compute = Callable[..., RefreshResult]


def some_parameters() -> list[nn.Parameter]:
    """Return 15 blocks of five shapes, and a vector; in each step of a window some blocks are due."""
    return [parameter(*shape, seed=n) for n, shape in enumerate([(16, 24), (20, 8), (8,), (12, 16), (5, 7), (8, 8)])]


def background(params: list[nn.Parameter] | list[tuple[str, nn.Parameter]], **options: Any) -> Shampoo:
    """Return an optimizer that refreshes in the background, every few steps."""
    return shampoo(params, **({"refresh": "background", "precondition_frequency": FREQUENCY} | options))


def trained(steps: int, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    """Return some parameters and their optimizer, after these steps."""
    params = some_parameters()
    optimizer = background(params, **options)
    drive(optimizer, params, range(steps))
    return params, optimizer


def wait_for_refreshes() -> None:
    """Wait until no thread computes a refresh any more; the results are not yet installed."""
    if _executor.cache_info().currsize:
        _executor().submit(int).result(timeout=60)  # the thread does one after another


def pending(optimizer: Shampoo) -> list[str]:
    """Return the keys of the blocks whose refresh is running or not yet installed."""
    stacks = optimizer.state_dict()["shampoo"]["stacks"]
    return sorted(k for s in stacks for k, waits in zip(s["keys"], s["pending"], strict=True) if waits)


def finish(optimizer: Shampoo) -> None:
    """Wait for all running refreshes."""
    for stack in (stack for unit in optimizer.units for stack in unit.stacks):
        for refresh in stack.pending.values():
            assert refresh is not None
            refresh.result()


def wrap_compute(patch: pytest.MonkeyPatch, wrapper: Callable[[Compute], Compute]) -> None:
    """Wrap the refreshes of all preconditioners."""
    for kind in (ShampooPreconditioner, SOAPPreconditioner, KLShampooPreconditioner):
        patch.setattr(kind, "compute", wrapper(kind.compute))
