"""Inverse roots: the closed form, the regularisation, a retry in float64, and what happens if that fails too."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.preconditioners.shampoo import ShampooPreconditioner
from shampoo_deepspeed.linalg.inverse_root import checked, diagonal_root, inverse_root, regularised, shrunk
from tests.support.bare import BARE
from tests.support.matrices import basis, compose
from tests.support.stepping import drive, parameter, refresh, same_bits, shampoo, snapshot
from tests.support.zoo import relative_error

F64 = torch.float64
eigh = torch.linalg.eigh


def closed_form(q: Tensor, values: Tensor, p: float, epsilon: float, relative: float) -> tuple[Tensor, float]:
    """Return the root from known eigenvectors and eigenvalues, and the smallest regularised eigenvalue."""
    shifted = values - min(values.min().item(), 0.0) + max(epsilon, relative * values.max().item())
    return compose(q, shifted ** (-1.0 / p)), shifted.min().item()


spectra = st.lists(st.floats(-8, 0), min_size=1, max_size=12)
roots = st.sampled_from([1.0, 2.0, 3.0, 4.0, 6.0, 8.0]) | st.floats(0.5, 10)


@given(
    spectra, st.floats(-12, 12), roots, st.floats(-4, -2), st.integers(0, 1000), st.sampled_from([torch.float32, F64])
)
def test_roots_are_those_of_the_closed_form(
    exponents: list[float], scale: float, p: float, relative: float, seed: int, dtype: torch.dtype
) -> None:
    """The bound is that of first-order perturbation theory.

    An error dA in the matrix moves A^(-1/p) by at most ||dA|| / (p * smallest eigenvalue) of its norm, and dA is a few
    roundings of ||A||.
    """
    d = len(exponents)
    q, values = basis(d, seed), 10.0**scale * 10.0 ** torch.tensor(exponents, dtype=F64)
    expected, smallest = closed_form(q, values, p, 0.0, 10.0**relative)
    found, failed = inverse_root(compose(q, values).to(dtype)[None], p, 0.0, 10.0**relative, dtype)
    eps = torch.finfo(dtype).eps
    condition = values.norm().item() / smallest
    assert failed == []
    assert found.dtype == dtype
    assert relative_error(found[0], expected) <= 8 * eps * (math.sqrt(d) + condition / p)


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
def test_the_pth_power_of_a_root_undoes_the_matrix(p: int) -> None:
    q, values = basis(9, p), torch.linspace(0.1, 5.0, 9, dtype=F64)
    root = inverse_root(compose(q, values)[None], float(p), 0.0, 1e-3, F64)[0][0]
    undone = torch.linalg.matrix_power(root, p) @ (compose(q, values) + 5e-3 * torch.eye(9, dtype=F64))
    torch.testing.assert_close(undone, torch.eye(9, dtype=F64), rtol=0, atol=1e-12)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.floats(0, 1), st.floats(0, 0.9))
def test_regularisation_is_one_formula(values: list[float], epsilon: float, relative: float) -> None:
    ascending = sorted(values)
    floor = max(epsilon, relative * ascending[-1])
    expected = [v - min(ascending[0], 0.0) + floor for v in ascending]
    found = regularised(torch.tensor([ascending], dtype=F64), epsilon, relative)[0].tolist()
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_regularisation_never_gives_a_negative_eigenvalue() -> None:
    """This holds even if rounding made all eigenvalues negative, so that the relative part is negative too."""
    values = torch.tensor([[-3.0, -2.0, -1e-9], [-1.0, 0.0, 4.0], [0.0, 0.0, 0.0]])
    assert (regularised(values, 0.0, 0.1) >= 0).all()
    assert (regularised(values, 1e-3, 0.1) >= 1e-3).all()


def test_the_root_of_a_zero_matrix_is_that_of_epsilon_and_zero_without_one() -> None:
    zero = torch.zeros(2, 3, 3)
    found, failed = inverse_root(zero, 4.0, 1e-12, 1e-6, torch.float32)
    assert failed == []
    torch.testing.assert_close(found, (1e3 * torch.eye(3)).expand(2, 3, 3))
    assert not inverse_root(zero, 4.0, 0.0, 1e-6, torch.float32)[0].any()


def test_negative_eigenvalues_are_shifted_and_not_cut() -> None:
    q, values = basis(4, 1), torch.tensor([-0.5, 0.25, 1.0, 4.0], dtype=F64)
    found = inverse_root(compose(q, values)[None], 2.0, 0.0, 0.01, F64)[0][0]
    expected = compose(q, (values + 0.5 + 0.04) ** -0.5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


# With epsilon 0.5 and relative_epsilon 0.25: the ridge is 1 for the first row, and 0.5 for the others.
EIGENVALUES = [[-0.5, 0.0, 1.0, 4.0], [0.0, 0.0, 0.0, 0.0], [-2.0, -1.0, -1.0, -0.25]]
DAMPED = {
    "shift": [[1.0, 1.5, 2.5, 5.5], [0.5, 0.5, 0.5, 0.5], [0.5, 1.5, 1.5, 2.25]],
    "saturate": [[1.0, 1.0, 1.0, 4.0], [0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]],
    "cutoff": [[0.0, 0.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]],
}


@pytest.mark.parametrize("damping", DAMPED)
def test_damping_says_what_happens_to_zero_negative_and_small_eigenvalues(damping: str) -> None:
    values, expected = torch.tensor(EIGENVALUES, dtype=F64), torch.tensor(DAMPED[damping], dtype=F64)
    assert torch.equal(regularised(values, 0.5, 0.25, damping), expected)
    powers = torch.where(expected > 0, expected.clamp_min(0.1) ** -0.5, 0.0)
    found, failed = diagonal_root(values, 2.0, 0.5, 0.25, F64, damping)
    assert failed == []
    torch.testing.assert_close(found, powers)
    q = torch.stack([basis(4, seed) for seed in range(3)])
    roots, failed = inverse_root(q * values[:, None] @ q.mT, 2.0, 0.5, 0.25, F64, "auto", damping)
    assert failed == []
    torch.testing.assert_close(roots, q * powers[:, None] @ q.mT)


@pytest.mark.parametrize("damping", DAMPED)
def test_without_a_ridge_null_directions_get_root_zero(damping: str) -> None:
    found, failed = diagonal_root(torch.tensor([[0.0, 4.0, 1.0]]), 2.0, 0.0, 0.0, torch.float32, damping)
    assert failed == []
    assert found.tolist() == [[0.0, 0.5, 1.0]]


@pytest.mark.parametrize("damping", DAMPED)
def test_an_eigenvalue_that_is_not_a_number_is_a_failure(damping: str) -> None:
    diagonals = torch.tensor([[1.0, math.nan], [4.0, 1.0]])
    assert diagonal_root(diagonals, 2.0, 0.5, 0.25, torch.float32, damping)[1] == [0]
    assert inverse_root(torch.diag_embed(diagonals), 2.0, 0.5, 0.25, torch.float32, "eigh", damping)[1] == [0]


def test_the_condition_number_is_that_of_the_eigenvalues_that_have_a_root() -> None:
    for damping, wanted in (("shift", 5.5), ("saturate", 4.0), ("cutoff", 1.0)):
        conditions: list[Tensor] = []
        diagonal_root(torch.tensor(EIGENVALUES), 2.0, 0.5, 0.25, torch.float32, damping, conditions)
        assert [float(c) for c in conditions] == [wanted], damping


def test_shrinkage_moves_a_matrix_towards_its_mean_eigenvalue_and_keeps_the_trace() -> None:
    matrices = torch.tensor([[[4.0, 1.0], [1.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]], [[1.0, 3.0], [3.0, -5.0]]])
    expected = torch.tensor([[[3.5, 0.75], [0.75, 0.5]], [[0.0, 0.0], [0.0, 0.0]], [[0.25, 2.25], [2.25, -4.25]]])
    before = matrices.clone()
    assert torch.equal(shrunk(matrices, 0.25), expected)
    assert torch.equal(matrices, before)
    assert torch.equal(shrunk(matrices, 1.0), torch.tensor([2.0, 0.0, -2.0])[:, None, None] * torch.eye(2))
    diagonals = torch.tensor([[4.0, 0.0, 2.0, 2.0], [1.0, 3.0, -4.0, 0.0]])
    assert shrunk(diagonals, 0.5).tolist() == [[3.0, 1.0, 2.0, 2.0], [0.5, 1.5, -2.0, 0.0]]
    assert diagonals.tolist() == [[4.0, 0.0, 2.0, 2.0], [1.0, 3.0, -4.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_matrix_of_rank_one_has_its_vector_and_the_floor(dtype: torch.dtype) -> None:
    """Gradients of single samples have rank one. The floor is far above rounding, so float32 must get it right too."""
    v = torch.tensor([3.0, 0.0, 4.0, 12.0], dtype=F64)
    along = torch.outer(v, v) / 169.0
    found = inverse_root(torch.outer(v, v).to(dtype)[None], 4.0, 1e-12, 1e-3, dtype)[0][0]
    expected = (169.0 * 1.001) ** -0.25 * along + 0.169**-0.25 * (torch.eye(4, dtype=F64) - along)
    assert relative_error(found, expected) < 8 * torch.finfo(dtype).eps * 1e3 / 4


def test_matrices_of_a_stack_do_not_affect_each_other() -> None:
    stack = torch.stack([compose(basis(5, n), torch.linspace(0.1, 10.0**n, 5, dtype=F64)) for n in range(3)]).float()
    together, _ = inverse_root(stack, 4.0, 0.0, 1e-6, torch.float32)
    for row in range(3):
        assert torch.equal(inverse_root(stack[row : row + 1], 4.0, 0.0, 1e-6, torch.float32)[0][0], together[row])


@pytest.mark.parametrize("dtype", [torch.float32, F64, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_narrow_matrices_are_widened_and_roots_have_the_dtype_asked_for(
    dtype: torch.dtype, stored: torch.dtype
) -> None:
    matrix = compose(basis(5, 0), torch.linspace(1.0, 3.0, 5, dtype=F64)).to(stored)[None]
    found, _ = inverse_root(matrix, 2.0, 0.0, 0.0, dtype)
    exact, _ = inverse_root(matrix.double(), 2.0, 0.0, 0.0, F64)
    assert found.dtype == dtype
    # Computed at least in float32, and rounded to the result's dtype once.
    assert relative_error(found, exact) < torch.finfo(torch.float32).eps * 20 + torch.finfo(dtype).eps


def no_eigh(*_: Any) -> Any:
    raise torch.linalg.LinAlgError("did not converge")


def float64_only(matrices: Tensor) -> Any:
    return eigh(matrices) if matrices.dtype == F64 else no_eigh()


def test_a_failure_in_float32_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = torch.stack([compose(basis(5, n), torch.linspace(0.1, 1.0, 5, dtype=F64)) for n in range(3)])
    expected, _ = inverse_root(stack.float().double(), 4.0, 0.0, 1e-6, F64)
    monkeypatch.setattr(torch.linalg, "eigh", float64_only)
    found, failed = inverse_root(stack.float(), 4.0, 0.0, 1e-6, torch.float32)
    assert failed == []
    assert torch.equal(found, expected.float())


def test_only_the_row_that_failed_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some solvers report no error, but return NaN for one matrix of the stack."""
    seen = []

    def spoilt(matrices: Tensor) -> Any:
        seen.append((tuple(matrices.shape), matrices.dtype))
        values, vectors = eigh(matrices)
        if len(seen) == 2:
            vectors.fill_(math.nan)
        return values, vectors

    stack = torch.stack([compose(basis(4, n), torch.linspace(0.5, 1.0, 4, dtype=F64)) for n in range(3)]).float()
    expected, _ = inverse_root(stack, 2.0, 0.0, 1e-6, torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", spoilt)
    found, failed = inverse_root(stack, 2.0, 0.0, 1e-6, torch.float32)
    assert failed == []
    assert seen == [((4, 4), torch.float32)] * 3 + [((4, 4), F64)]
    torch.testing.assert_close(found, expected)


def test_an_error_of_cusolver_is_retried_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.linalg.eigh

    def failing(matrices: torch.Tensor) -> Any:
        if matrices.dtype == torch.float32:
            raise RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED")
        return real(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    found, failed = inverse_root(torch.eye(3).unsqueeze(0) * 4.0, 2.0, 0.0, 0.0, torch.float32)
    assert failed == []
    torch.testing.assert_close(found, torch.eye(3).unsqueeze(0) * 0.5)
    monkeypatch.setattr(torch.linalg, "eigh", lambda _: (_ for _ in ()).throw(RuntimeError("out of memory")))
    with pytest.raises(RuntimeError, match="out of memory"):
        inverse_root(torch.eye(3).unsqueeze(0), 2.0, 0.0, 0.0, torch.float32)


def test_vectors_that_are_not_orthonormal_are_recomputed_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batched kernels have returned such vectors without an error. On the CPU there is no such check."""
    real = torch.linalg.eigh

    def skewed(matrices: Tensor) -> Any:
        values, vectors = real(matrices)
        if matrices.dtype == torch.float32:
            wrong = (matrices == stack[1]).flatten(-2).all(-1)
            vectors[..., 0] = torch.where(wrong.unsqueeze(-1), vectors[..., 1], vectors[..., 0])
        return values, vectors

    stack = torch.stack([compose(basis(4, n), torch.linspace(0.5, 1.0, 4, dtype=F64)) for n in range(3)]).float()
    expected, _ = inverse_root(stack, 2.0, 0.0, 1e-6, torch.float32)
    monkeypatch.setattr(torch.linalg, "eigh", skewed)
    unnoticed, _ = inverse_root(stack, 2.0, 0.0, 1e-6, torch.float32)
    assert relative_error(unnoticed[1], expected[1]) > 0.1
    monkeypatch.setattr("shampoo_deepspeed.linalg.inverse_root.TRUSTED", ())
    found, failed = inverse_root(stack, 2.0, 0.0, 1e-6, torch.float32)
    assert failed == []
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_rounding_alone_causes_no_recomputation(dtype: torch.dtype) -> None:
    values = torch.logspace(-12, 0, 512, dtype=F64)
    stack = torch.stack([compose(basis(512, n), values) for n in range(2)]).to(dtype)
    found, vectors = checked(*torch.linalg.eigh(stack))
    assert torch.isfinite(found).all() and torch.isfinite(vectors).all()


def test_rows_that_fail_for_good_are_reported_and_the_others_are_right() -> None:
    stack = torch.stack([torch.eye(3) * 4.0, torch.full((3, 3), math.nan), torch.eye(3) * 16.0])
    found, failed = inverse_root(stack, 2.0, 0.0, 0.0, torch.float32)
    assert failed == [1]
    torch.testing.assert_close(found[[0, 2]], torch.stack([torch.eye(3) * 0.5, torch.eye(3) * 0.25]))


def test_a_root_that_overflows_is_a_failure_and_never_applied() -> None:
    """With p = 1/4, a floor of 1e-30 gives a root of 1e120, which also overflows if float64 is rounded to float32."""
    _, failed = inverse_root(torch.zeros(1, 2, 2), 0.25, 1e-30, 0.0, torch.float32)
    assert failed == [0]


def test_a_block_of_which_one_mode_fails_keeps_all_its_roots() -> None:
    """Roots of one block belong together; other blocks get their new roots."""
    preconditioner = ShampooPreconditioner(ShampooConfig(**BARE, betas=(0.9, 1.0)))
    state = preconditioner.new_state(2, (3, 4), torch.device("cpu"), torch.float32)
    for mode, d in enumerate((3, 4)):
        state[f"factor_{mode}"].copy_(torch.eye(d))
        state[f"root_{mode}"].fill_(7.0)
    state["factor_1"][0] = math.nan
    assert refresh(preconditioner, state, 10, torch.zeros(2, 3, 4)) == [0]
    for mode, d in enumerate((3, 4)):
        assert (state[f"root_{mode}"][0] == 7.0).all()
        torch.testing.assert_close(state[f"root_{mode}"][1], torch.eye(d), rtol=1e-5, atol=1e-5)


def stack_of(optimizer: Shampoo) -> dict[str, Any]:
    (stack,) = optimizer.state_dict()["shampoo"]["stacks"]
    assert isinstance(stack, dict)
    return stack


def trained(eigh_from: dict[int, Callable[..., Any]], steps: int, patch: pytest.MonkeyPatch) -> Shampoo:
    """Take steps with a refresh each; from the given steps on, eigh is replaced."""
    p = parameter(6, 6)
    optimizer = shampoo([("w", p)], precondition_frequency=1, failure_limit=3)
    for step in range(steps):
        if step in eigh_from:
            patch.setattr(torch.linalg, "eigh", eigh_from[step])
        drive(optimizer, [p], [step])
    return optimizer


def test_a_failed_refresh_keeps_the_last_good_root_and_training_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    good = stack_of(trained({}, 3, monkeypatch))["tensors"]
    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        optimizer = trained({3: no_eigh}, 5, monkeypatch)
    stack = stack_of(optimizer)
    for mode in (0, 1):
        assert torch.equal(stack["tensors"][f"root_{mode}"], good[f"root_{mode}"])
        assert not torch.equal(stack["tensors"][f"factor_{mode}"], good[f"factor_{mode}"])
    assert stack["failures"] == [2] and set(optimizer.state_dict()["shampoo"]["steps"].values()) == {5}
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["no new inverse root for block w/0"] * 2
    assert "failed 2 times in a row; the last good one is kept" in caplog.records[-1].getMessage()


def test_a_success_ends_the_row_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = trained({1: no_eigh, 3: eigh, 4: no_eigh, 6: eigh}, 12, monkeypatch)
    assert stack_of(optimizer)["failures"] == [0]


def test_failures_in_a_row_become_an_error_agreed_one_step_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third failure is in step 6 (counted from 1), all ranks know it in step 7, and the next call raises it."""
    optimizer = trained({3: no_eigh}, 7, monkeypatch)
    p = optimizer.param_groups[0]["params"][0]
    before = snapshot([p])
    with pytest.raises(RuntimeError, match=r"inverse roots of blocks failed 3 times in a row \(failure_limit = 3"):
        optimizer.step()
    assert same_bits(snapshot([p]), before)


def test_a_block_without_any_root_yet_goes_on_with_its_grafting_update(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.linalg, "eigh", no_eigh)
    p, never = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([p], failure_limit=100)
    drive(optimizer, [p], range(8))
    drive(shampoo([never], start_preconditioning_step=1000), [never], range(8))
    assert torch.equal(p, never)
    monkeypatch.setattr(torch.linalg, "eigh", eigh)
    drive(optimizer, [p], range(8, 10))
    assert all(all(stack["refreshed"]) for stack in optimizer.state_dict()["shampoo"]["stacks"])
