"""CholeskyQR gives the Q of a QR decomposition to rounding, in few multiply-adds, or NaN; it reads nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shampoo_deepspeed.linalg import eigenbases
from shampoo_deepspeed.linalg.cholesky_qr import cholesky_qr
from shampoo_deepspeed.linalg.eigenbases import power_step, rayleigh, root_from_basis
from tests.support.multiply_adds import MultiplyAdds
from tests.support.simulated_device import Mode, on_device, simulate, values_of

F64 = torch.float64


def stale(d: int, condition: float, drift: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return a matrix [1, d, d] with a log-uniform spectrum, and its eigenbasis turned by about so many radians."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=F64))[0]
    values = torch.logspace(0.0, -torch.tensor(condition, dtype=F64).log10().item(), d, dtype=F64)
    turn = torch.randn(d, d, generator=generator, dtype=F64) / d**0.5
    return ((basis * values) @ basis.T)[None], (basis @ torch.matrix_exp(drift * (turn - turn.T)))[None]


def deviation(bases: Tensor) -> float:
    """Return the largest element of Q'Q - I."""
    return (bases.mT @ bases - torch.eye(bases.shape[-1]).to(bases)).abs().max().item()


@pytest.mark.parametrize("drift", [0.0, 1e-3, 0.1, 1.0])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("d", [1, 2, 33, 128])
def test_it_is_the_q_of_the_qr_decomposition(d: int, condition: float, drift: float) -> None:
    """Columns of A Q in order, for bases that are exact, stale and useless; signs are those of a positive diagonal."""
    matrix, basis = stale(d, condition, drift)
    order = rayleigh(matrix, basis).argsort(descending=True)
    columns = (matrix @ basis).gather(-1, order[:, None].expand_as(matrix))
    q, r = torch.linalg.qr(columns)
    expected = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]
    found = cholesky_qr(columns)
    assert deviation(found) < 1e-13
    assert (found - expected).abs().max() < 1e-10 * condition
    narrow = cholesky_qr(columns.float())
    assert deviation(narrow) < 2e-6
    if drift <= 0.1 and condition <= 1e4:
        assert (narrow - expected).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_columns_may_have_any_scale(scale: float) -> None:
    matrix, basis = stale(16, 1e3, 0.01)
    columns = (matrix @ basis).float()
    torch.testing.assert_close(cholesky_qr(columns * scale), cholesky_qr(columns), rtol=0, atol=2e-6)


def test_dependent_columns_give_nan_and_no_other_matrix_suffers() -> None:
    """Such as two equal columns, a column of zeros, NaN, and infinity."""
    good, _ = stale(8, 10.0, 0.0)
    stack = good.float().repeat(6, 1, 1)
    stack[1, :, 3] = stack[1, :, 2]
    stack[2, :, 0] = 0.0
    stack[3, 4, 4] = torch.nan
    stack[4, 0, 7] = torch.inf
    found = cholesky_qr(stack)
    assert found.isnan().flatten(1).all(1).tolist() == [False, True, True, True, True, False]
    assert torch.equal(found[0], found[5]) and torch.equal(found[0], cholesky_qr(stack[:1])[0])


def refresh(matrices: Tensor, bases: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the next bases, their eigenvalues, and roots -1/2."""
    found, _ = power_step(matrices, bases, 1e-4)
    values = rayleigh(matrices, found)
    return found, values, root_from_basis(values, found, 2.0, 1e-12, 1e-4, "shift")[0]


def test_a_refresh_takes_at_most_eight_cubes_of_multiply_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a factor matrix and its last basis to the next basis, its eigenvalues and the root."""
    matrix, basis = (t.float().repeat(3, 1, 1) for t in stale(64, 1e3, 0.05))
    monkeypatch.setattr(eigenbases, "orthonormalised", cholesky_qr)
    with MultiplyAdds() as counted:
        refresh(matrix, basis)
    assert 7 * 3 * 64**3 <= counted.count <= 8 * 3 * 64**3
    assert not counted.decompositions


def test_on_an_accelerator_it_takes_the_place_of_qr_and_reads_nothing_back(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, basis = (t.float().repeat(3, 1, 1) for t in stale(64, 1e3, 0.05))
    expected = refresh(matrix, basis)
    device = simulate(monkeypatch)
    monkeypatch.setattr(torch.linalg, "qr", None)
    with Mode():
        there, known = on_device(matrix), on_device(basis)
        power_step(there, known, 1e-4)
        assert not device.reads and not device.mixed
        found, values, roots = (values_of(t) for t in refresh(there, known))
    torch.testing.assert_close((found.mT @ expected[0]).abs(), torch.eye(64).expand(3, 64, 64), rtol=0, atol=1e-4)
    torch.testing.assert_close(values, expected[1], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(roots, expected[2], rtol=0, atol=1e-3 * expected[2].max().item())


def test_a_zero_matrix_keeps_its_basis_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block without gradients is no failure."""
    _, basis = stale(5, 10.0, 0.0)
    simulate(monkeypatch)
    with Mode():
        found, _ = power_step(on_device(torch.zeros(1, 5, 5, dtype=F64)), on_device(basis), 1e-4)
    torch.testing.assert_close(values_of(found), basis)
