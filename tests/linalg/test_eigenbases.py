"""Eigenbases of stacks: correct, in descending order, orthonormal even for singular matrices, and judged row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed.linalg.eigenbases import (
    eigenbasis,
    good_enough,
    known,
    non_finite,
    power_step,
    rayleigh,
    renewed,
    root_from_basis,
)
from shampoo_deepspeed.linalg.inverse_root import inverse_root

F64 = torch.float64
eigh = torch.linalg.eigh


def spectra(*values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return matrices with these eigenvalues, and their eigenbases."""
    d = len(values[0])
    generator = torch.Generator().manual_seed(seed)
    bases = torch.linalg.qr(torch.randn(len(values), d, d, generator=generator, dtype=F64))[0]
    return bases @ torch.diag_embed(torch.tensor(values, dtype=F64)) @ bases.mT, bases


def assert_orthonormal(bases: Tensor) -> None:
    torch.testing.assert_close(bases.mT @ bases, torch.eye(bases.shape[-1]).to(bases).expand_as(bases))


def test_eigenvalues_fall_and_columns_are_theirs() -> None:
    matrices, expected = spectra([4.0, 3.0, 2.0, 1.0], [9.0, 1.0, 0.5, 0.0])
    values, bases, failed = eigenbasis(matrices)
    assert failed == []
    torch.testing.assert_close(values, torch.tensor([[4.0, 3.0, 2.0, 1.0], [9.0, 1.0, 0.5, 0.0]], dtype=F64))
    torch.testing.assert_close((bases.mT @ expected).abs(), torch.eye(4, dtype=F64).expand(2, 4, 4))


def test_a_failure_in_float32_is_retried_in_float64_and_a_second_one_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matrices, expected = spectra([4.0, 2.0, 1.0], [3.0, 2.0, 1.0])

    def float64_only(stack: Tensor) -> Any:
        if stack.dtype == F64:
            return eigh(stack)
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", float64_only)
    values, bases, failed = eigenbasis(matrices.float())
    assert failed == [] and bases.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor([[4.0, 2.0, 1.0], [3.0, 2.0, 1.0]]))
    spoiled = torch.cat([matrices[:1], torch.full_like(matrices[:1], math.nan), matrices[1:]]).float()
    _, bases, failed = eigenbasis(spoiled)
    assert failed == [1]
    torch.testing.assert_close((bases[[0, 2]].double().mT @ expected).abs(), torch.eye(3, dtype=F64).expand(2, 3, 3))


def test_power_steps_converge_to_the_eigenbasis_and_report_where_columns_came_from() -> None:
    matrices, expected = spectra([8.0, 4.0, 2.0, 1.0], [27.0, 9.0, 3.0, 1.0])
    bases = torch.eye(4, dtype=F64).expand(2, 4, 4)
    for _ in range(60):
        bases, order = power_step(matrices, bases)
    assert order.tolist() == [[0, 1, 2, 3]] * 2
    torch.testing.assert_close((bases.mT @ expected).abs(), torch.eye(4, dtype=F64).expand(2, 4, 4))
    shuffled = bases[:, :, [2, 0, 3, 1]]
    again, order = power_step(matrices, shuffled)
    assert order.tolist() == [[1, 3, 0, 2]] * 2
    torch.testing.assert_close(again.abs(), bases.abs())


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_power_step_of_a_singular_matrix_is_orthonormal(dtype: torch.dtype) -> None:
    """Rank one, a null direction, and zero; columns without a contribution from the matrix complete the basis."""
    u = torch.tensor([[1.0, 2.0, 2.0]], dtype=dtype)
    matrices = torch.stack([u.mT @ u, torch.diag(torch.tensor([1.0, 0.0, 2.0])).to(dtype), torch.zeros(3, 3).to(dtype)])
    bases, _ = power_step(matrices, torch.eye(3).to(dtype).expand(3, 3, 3))
    assert_orthonormal(bases)
    torch.testing.assert_close(bases[0, :, 0].abs(), u[0] / 3)


def test_with_a_ridge_directions_outside_the_matrix_s_range_do_not_change() -> None:
    """Rank 4 of 16 in float32: without a ridge, the other 12 columns become another basis of their space each time."""
    matrices, bases = spectra([4.0, 3.0, 2.0, 1.0, *[0.0] * 12])
    matrices, bases = matrices.float(), bases.float()
    largest = {}
    for ridge in (0.0, 1e-6):
        turned, order = power_step(matrices, bases, ridge)
        overlaps = bases[:, :, order[0]].mT @ turned
        largest[ridge] = (overlaps.abs() - torch.eye(16)).abs().max().item()
    assert largest[1e-6] < 0.2
    assert largest[0.0] > 0.5


def test_a_basis_is_good_enough_by_its_own_off_diagonal_mass() -> None:
    """A = [[1, x], [x, 1]] in the standard basis: sqrt(2) x of its norm sqrt(2 + 2 x^2) is off the diagonal."""
    matrices = torch.stack([torch.tensor([[1.0, x], [x, 1.0]]) for x in (0.0, 0.1, 0.2, 0.2)])
    bases = torch.eye(2).repeat(4, 1, 1)
    bases[3] = 0.0  # never computed
    assert known(bases).tolist() == [True, True, True, False]
    assert good_enough(matrices, bases, 0.0).tolist() == [True, False, False, False]
    assert good_enough(matrices, bases, 0.11).tolist() == [True, True, False, False]
    assert good_enough(matrices, bases, 0.21).tolist() == [True, True, True, False]
    assert good_enough(matrices * 1e-12, bases, 0.11).tolist() == [True, True, False, False]
    assert good_enough(torch.full((1, 2, 2), math.nan), bases[:1], 0.5).tolist() == [False]


def test_a_kept_basis_gets_new_eigenvalues_and_a_bad_one_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, bases = spectra([4.0, 2.0, 1.0], [4.0, 2.0, 1.0], [4.0, 2.0, 1.0])
    moved, new_bases = spectra([5.0, 0.5, 7.0], [9.0, 2.0, 1.0], [3.0, 2.0, 1.0], seed=1)
    now = torch.stack([bases[0] @ torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64)) @ bases[0].T, *moved[1:]])
    decomposed: list[Tensor] = []

    def counted(matrix: Tensor) -> Any:
        decomposed.append(matrix)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    found, values, _, moves, stepped, failed = renewed(now, bases, 0, 0.01)
    assert (len(decomposed), failed, len(stepped)) == (2, [], 0)
    assert torch.equal(found[0], bases[0]) and moves.tolist() == [False, True, True]
    torch.testing.assert_close(values, torch.tensor([[1.0, 2.0, 4.0], [9.0, 2.0, 1.0], [3.0, 2.0, 1.0]], dtype=F64))
    torch.testing.assert_close((found[1:].mT @ new_bases[1:]).abs(), torch.eye(3, dtype=F64).expand(2, 3, 3))
    now[2] = math.nan
    assert renewed(now, bases, 0, 0.01).failed == [2]


def test_a_tracked_basis_takes_a_step_and_only_an_unknown_one_is_decomposed(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, bases = spectra([4.0, 2.0, 1.0], [4.0, 2.0, 1.0], [4.0, 2.0, 1.0])
    moved, _ = spectra([5.0, 0.5, 7.0], [9.0, 2.0, 1.0], [3.0, 2.0, 1.0], seed=1)
    before = torch.stack([bases[0], bases[1][:, [2, 0, 1]], torch.zeros_like(bases[2])])
    decomposed: list[Tensor] = []

    def counted(matrix: Tensor) -> Any:
        decomposed.append(matrix)
        return eigh(matrix)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    now = torch.stack([matrices[0], moved[1], moved[2]])
    found = renewed(now, before, 1, 0.01, 0.1)
    assert (len(decomposed), found.stepped.tolist(), found.moved.tolist()) == (1, [1], [False, True, False])
    expected, order = power_step(now[1:2], before[1:2], 0.1)
    assert torch.equal(found.bases[1], expected[0]) and torch.equal(found.columns[1], order[0])
    assert torch.equal(found.bases[0], bases[0])
    torch.testing.assert_close(found.values[2], torch.tensor([3.0, 2.0, 1.0], dtype=F64))
    twice, (second, moves) = renewed(now, before, 2, 0.01, 0.1), power_step(now[1:2], expected, 0.1)
    assert torch.equal(twice.bases[1], second[0]) and torch.equal(twice.columns[1], order[0][moves[0]])
    assert torch.equal(twice.bases[[0, 2]], found.bases[[0, 2]])
    now[1] = math.nan
    assert renewed(now, before, 1, None, 0.1).failed == [1]


def test_decomposed_again_columns_continue_those_with_their_place_in_the_order() -> None:
    matrices, bases = spectra([4.0, 2.0, 1.0])
    found = renewed(matrices, bases[:, :, [2, 0, 1]], 0, None)
    assert found.columns.tolist() == [[1, 2, 0]]
    torch.testing.assert_close(found.bases.abs(), bases.abs())
    torch.testing.assert_close(rayleigh(matrices, found.bases), found.values)


@pytest.mark.parametrize("damping", ["shift", "cutoff", "saturate"])
@pytest.mark.parametrize("root", [2.0, 4.0, 3.0])
def test_a_root_from_a_basis_is_the_solvers_root(root: float, damping: str) -> None:
    matrices, bases = spectra([4.0, 2.0, 1.0, 0.0], [1.0, 1e-8, -1e-9, 3.0])
    expected, _ = inverse_root(matrices, root, 1e-12, 1e-6, F64, damping=damping)
    values = (bases * (matrices @ bases)).sum(-2)
    found, failed = root_from_basis(values, bases, root, 1e-12, 1e-6, damping)
    assert failed == []
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (
        root_from_basis(torch.full_like(values, math.nan), bases, root, 0.0, 0.0, damping)[1]
        == [0, 1]
        == non_finite(torch.full((2, 3, 3), math.inf))
    )
