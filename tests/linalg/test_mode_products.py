"""Products along modes, and symmetric products, of which the CPU computes only one half."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm import block_stack as stacks
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.linalg.inverse_root import symmetric
from shampoo_deepspeed.linalg.mode_products import STRIP, add_gram_
from tests.support.reference import Options, Reference, new_block
from tests.support.stepping import made_up
from tests.support.zoo import relative_error

F64 = torch.float64
ACCEPTED = None


@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("d", [1, 7, STRIP - 1, STRIP, 2 * STRIP - 1, 2 * STRIP, 2 * STRIP + 1, 3 * STRIP + 5, 600])
def test_lower_triangles_of_symmetric_products(d: int, transposed: bool, decay: float) -> None:
    """Elements above them are never read."""
    x = made_up(torch.empty(2, 9, d, dtype=F64), 0).mT if transposed else made_up(torch.empty(2, d, 9, dtype=F64), 0)
    whole = made_up(torch.empty(2, d, d, dtype=F64), 1)
    whole = whole + whole.mT
    half = whole.tril() + torch.full_like(whole, 1e9).triu(1)
    add_gram_(half, x, 0, decay, 0.3)
    torch.testing.assert_close(symmetric(half), decay * whole + 0.3 * x @ x.mT, rtol=1e-12, atol=1e-12)


def test_fewer_multiplications_than_of_a_whole_product() -> None:
    """Nothing is written above the diagonal strips."""
    half = torch.zeros(1, 4 * STRIP, 4 * STRIP)
    add_gram_(half, torch.ones(1, 4 * STRIP, 3), 0, 1.0, 1.0)
    assert half[0, :-STRIP, -STRIP:].count_nonzero() == 0
    assert half.count_nonzero() == 10 * STRIP**2


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
@pytest.mark.parametrize("refresh", ["sync", "staggered", "background"])
def test_blocks_with_strips_take_the_references_steps(preconditioner: str, refresh: str) -> None:
    rule: dict[str, Any] = {"preconditioner": preconditioner, "precondition_frequency": 2, "refresh": refresh}
    rule |= {"relative_epsilon": 1e-3, "betas": (0.9, 0.9)}
    shape = (2 * STRIP + 3, 3 * STRIP)
    config = ShampooConfig(factor_dtype="float64", root_dtype="float64", **rule)
    stack = BlockStack(["a/0"], shape, config, torch.device("cpu"), F64)
    block = new_block((...,), torch.zeros(shape, dtype=F64), Options(**rule))
    mixing = [made_up(torch.empty(d, d, dtype=F64), 0, d) for d in shape]
    for step in range(1, 8):  # full rank and separate eigenvalues, so that eigenvectors are well defined
        g = mixing[0] @ made_up(torch.empty(shape, dtype=F64), step) @ mixing[1]
        (found,) = stack.step(0, g[None].clone(), [step], config, ACCEPTED)
        assert relative_error(found, Reference.step_block(block, g, step, Options(**rule))) < 1e-8, step
    for mode, factor in block.factors.items():
        assert relative_error(symmetric(stack.tensors[f"factor_{mode}"])[0], factor) < 1e-9


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_products_in_bfloat16_round_updates_and_leave_statistics_alone(preconditioner: str) -> None:
    config = ShampooConfig(preconditioner=preconditioner, precondition_frequency=2, betas=(0.9, 0.9))
    configs = [config, dataclasses.replace(config, apply_dtype="bfloat16")]
    stacks = [BlockStack(["a/0"], (12, 8), c, torch.device("cpu"), torch.float32) for c in configs]
    for step in range(1, 9):
        g = made_up(torch.empty(1, 12, 8), step)
        full, narrow = (stack.step(0, g.clone(), [step], c, None) for stack, c in zip(stacks, configs, strict=True))
        assert narrow.dtype == torch.float32
        assert torch.equal(full, narrow) == (step < 2)  # from the first refresh on they differ, by rounding
        assert relative_error(narrow, full) < 3e-2
    for name in ("factor_0", "factor_1"):
        same = torch.equal(stacks[0].tensors[name], stacks[1].tensors[name])
        assert same, name


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
@pytest.mark.parametrize("refresh", ["sync", "staggered", "background"])
def test_few_rows_at_a_time_take_the_same_steps(
    preconditioner: str, refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, steps and refreshes process a stack in parts that fit into the cache."""
    phases = None if refresh == "sync" else [0, 0, 1, 1, 1]
    options: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64", "refresh": refresh}
    config = ShampooConfig(preconditioner=preconditioner, precondition_frequency=2, betas=(0.9, 0.9), **options)
    keys = [f"a/{row}" for row in range(5)]
    runs = []
    for cached, refreshed in ((1 << 30, 1 << 30), (1 << 30, 1), (3 * 4 * 12 * 8, 2 * 4 * 12 * 12), (1, 1)):
        monkeypatch.setattr(stacks, "CACHED_BYTES", cached)
        monkeypatch.setattr(stacks, "REFRESHED_BYTES", refreshed)
        stack = BlockStack(keys, (12, 8), config, torch.device("cpu"), F64, phases)
        found = [
            stack.step(0, made_up(torch.empty(5, 12, 8, dtype=F64), step), [step] * 5, config, ACCEPTED)
            for step in range(1, 8)
        ]
        assert all(stack.refreshed)
        runs.append([torch.stack(found), *stack.tensors.values()])
    for run in runs[1:]:
        assert all(relative_error(one, other) < 1e-12 for one, other in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("tolerance", [None, 0.05])
@pytest.mark.parametrize(("ridge", "expected"), [(1e-6, F64), (1e-4, torch.float32)])
def test_kl_shampoo_decomposes_in_float64_if_the_ridge_is_small(
    ridge: float, expected: torch.dtype, tolerance: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    eigh = torch.linalg.eigh

    def watched(matrices: Tensor) -> Any:
        seen.add(matrices.dtype)
        return eigh(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", watched)
    config = ShampooConfig(precondition_frequency=1, relative_epsilon=ridge, refresh_tolerance=tolerance)
    stack = BlockStack(["a/0"], (12, 8), config, torch.device("cpu"), torch.float32)
    for step in range(1, 4):
        stack.step(0, made_up(torch.empty(1, 12, 8), step), [step], config, None)
    assert seen == {expected}
