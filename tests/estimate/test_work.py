"""The planner's FLOPs, bytes and launches are those that real steps on a simulated accelerator make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.estimate.work import (
    guarded_launches,
    plain_launches,
    plain_work,
    refresh_launches,
    refresh_work,
    solver_in_force,
)
from shampoo_deepspeed.linalg.precision import full_precision
from shampoo_deepspeed.options.choices import MATMUL_PRECISIONS, PRECONDITIONERS
from shampoo_deepspeed.options.family import FAMILY
from tests.support.device_work import Work, counted
from tests.support.simulated_device import DEVICE, Mode, on_device, simulate
from tests.support.stepping import made_up

SHAPE, BATCH = (48, 80), 3
# Numbers for each block and for each of its rows and columns are not planned: they are at most this share here.
SMALL = 0.04
# All operators of a step with a refresh of square blocks. KL-SOAP whitens as KL-Shampoo and has SOAP's moments;
# 25 of SOAP-Muon's are those of Newton and Schulz.
REFRESHING = {"shampoo": 66, "kl_shampoo": 78, "soap": 69, "kl_soap": 97, "soap_muon": 91}
WITH_FACTORS = [name for name in PRECONDITIONERS if FAMILY[name].statistics]
SOLVERS = {name: ("auto", "eigh", "qr", "coupled_newton") for name in ("shampoo", "kl_shampoo")}


def options(**more: Any) -> ShampooConfig:
    """All blocks refresh in steps 5, 10 and 15; every gradient goes into the factors, or one in so many."""
    schedule = {"refresh": "sync", "precondition_frequency": 5, "start_preconditioning_step": 5, "refresh_growth": 0.0}
    return ShampooConfig(**{**schedule, "early_relative_epsilon": 0.0, "statistics_frequency": 1, **more})


def steps(
    config: ShampooConfig,
    monkeypatch: pytest.MonkeyPatch,
    gradient: Callable[[int], Tensor],
    shape: tuple[int, ...] = SHAPE,
) -> list[Work]:
    """What steps 1 to 15 of a stack do; the device has done one before the next begins."""
    device = simulate(monkeypatch)
    found = []
    with Mode():
        keys = [f"a/{n}" for n in range(BATCH)]
        stack = BlockStack(keys, shape, config, DEVICE, torch.float32)
        for step in range(1, 16):
            gradients = on_device(gradient(step))
            device.catch_up()
            with full_precision("cuda"), counted() as work:
                stack.step(0, gradients, [step] * BATCH, config, None)
            found.append(work)
    return found


def full_rank(step: int) -> Tensor:
    return made_up(torch.empty(BATCH, *SHAPE), step)


def full_rank_square(step: int) -> Tensor:
    return made_up(torch.empty(BATCH, 64, 64), step)


def of_rank_one(step: int) -> Tensor:
    """Factor matrices are as ill-conditioned as the ridge allows."""
    return (torch.linspace(1, 2, SHAPE[0])[:, None] * torch.linspace(-1, 1, SHAPE[1])).expand(BATCH, *SHAPE).clone()


@pytest.mark.parametrize("precision", MATMUL_PRECISIONS)
@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_step_without_a_refresh(
    preconditioner: str, frequency: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, so that with a frequency of two each mode has had its gradient once."""
    config = options(preconditioner=preconditioner, statistics_frequency=frequency, matmul_precision=precision)
    found = steps(config, monkeypatch, full_rank)[11:13]
    planned = plain_work(SHAPE, config).times(BATCH * 2)
    lowered = sum(work.flops[precision] for work in found) if precision != "highest" else planned.lowered
    assert lowered == planned.lowered
    assert sum(sum(work.flops.values()) for work in found) == planned.lowered + planned.full
    assert sum(work.product_bytes for work in found) == planned.lowered_bytes + planned.full_bytes
    assert sum(work.other_bytes for work in found) == pytest.approx(planned.nbytes, rel=SMALL)
    assert sum(work.launches for work in found) == 2 * plain_launches(config, 2)
    assert sum(work.reads for work in found) == 0


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_a_stack_has_few_operators_in_a_step_without_a_refresh(preconditioner: str) -> None:
    """Under the default options, and with what a step adds because it may be rejected."""
    config = ShampooConfig(preconditioner=preconditioner).for_blocks
    found = plain_launches(config, 2) + guarded_launches(config, 2)[0]
    # SOAP-Muon is both: 21 of its operators are products, 15 of them those of Newton and Schulz.
    assert (
        found
        <= {"shampoo": 23, "kl_shampoo": 26, "soap": 31, "kl_soap": 39, "muon": 36, "soap_muon": 53}[preconditioner]
    )


@pytest.mark.parametrize(("preconditioner", "most"), REFRESHING.items())
def test_a_step_with_a_refresh_has_few_operators_and_reads_nothing(
    preconditioner: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All operators of the step of square blocks, by orthogonal iteration."""
    found = steps(options(preconditioner=preconditioner, solver="qr"), monkeypatch, full_rank_square, (64, 64))[14]
    assert (found.launches, found.reads) == (most, 0)
    assert most <= 80 or preconditioner in ("kl_soap", "soap_muon")


@pytest.mark.parametrize("solver", ["qr", "coupled_newton", "eigh"])
@pytest.mark.parametrize("frequency", [1, 2])
def test_no_later_refresh_reads_the_device(solver: str, frequency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do those of three modes, or of diagonals."""
    more: dict[str, Any] = {"solver": solver, "statistics_frequency": frequency, "normalize_gradients": False}
    config = options(preconditioner="shampoo", **more)
    made = lambda step: made_up(torch.empty(BATCH, 6, 4, 6), step)  # noqa: E731
    found = steps(config, monkeypatch, made, (6, 4, 6))
    assert [work.reads for work in found[5:]] == [0] * 10 and found[4].reads > 0


@pytest.mark.parametrize(
    ("preconditioner", "solver"),
    [(name, solver) for name in WITH_FACTORS for solver in SOLVERS.get(name, ("auto", "eigh"))],
)
@pytest.mark.parametrize("ridge", [1e-4, 1e-6])
def test_a_refresh(preconditioner: str, solver: str, ridge: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config = options(preconditioner=preconditioner, solver=solver, relative_epsilon=ridge)
    found = steps(config, monkeypatch, full_rank)
    plain, refreshing = found[10], found[14]
    planned = refresh_work(SHAPE, config, BATCH).times(BATCH)
    assert sum(refreshing.flops.values()) - sum(plain.flops.values()) == planned.full
    assert refreshing.factorizations == planned.factorizations
    assert refreshing.decomposed == planned.decomposed
    assert refreshing.product_bytes - plain.product_bytes == planned.full_bytes
    assert refreshing.other_bytes - plain.other_bytes == pytest.approx(planned.nbytes, rel=SMALL)
    assert refreshing.launches - plain.launches == refresh_launches(config, SHAPE, BATCH)
    assert refreshing.reads == 0


def test_all_matrices_take_as_many_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one step depend on the ridge alone, as a read would tell which need fewer."""
    config = options(preconditioner="shampoo", solver="coupled_newton")
    easy, hard = (steps(config, monkeypatch, gradient) for gradient in (full_rank, of_rank_one))
    assert easy[14].by_name == hard[14].by_name


def test_auto_is_the_solver_that_accelerators_take() -> None:
    names = {name: solver_in_force(options(preconditioner=name), 2) for name in WITH_FACTORS}
    assert names == {"kl_shampoo": "coupled_newton", "shampoo": "coupled_newton", "soap": "qr", "kl_soap": "qr"} | {
        "soap_muon": "qr"
    }
    kept = options(preconditioner="shampoo", refresh_tolerance=0.1)
    assert solver_in_force(kept, 2) == "eigh"
    assert solver_in_force(options(preconditioner="shampoo", exponent_override=2.5), 2) == "eigh"
