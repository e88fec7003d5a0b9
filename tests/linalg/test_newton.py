"""The iterative solver: roots of a float64 eigendecomposition, a bound that holds, and a fallback if they fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_deepspeed import OptionError, ShampooConfig
from shampoo_deepspeed.linalg import newton
from shampoo_deepspeed.linalg.inverse_root import chosen_solver, inverse_root
from shampoo_deepspeed.linalg.newton import coupled_newton, upper_bound, with_ridge
from shampoo_deepspeed.linalg.precision import full_precision
from tests.support.matrices import basis, compose
from tests.support.stepping import drive, parameter, shampoo, snapshot
from tests.support.zoo import relative_error

F64 = torch.float64
D = 24
SPECTRA: dict[str, Tensor] = {
    "identity": torch.ones(D, dtype=F64),
    "large": torch.linspace(1e9, 3e12, D, dtype=F64),
    "small": torch.linspace(1e-26, 3e-24, D, dtype=F64),
    "rank_one": torch.tensor([1.0] + [0.0] * (D - 1), dtype=F64),
    "null_update": torch.tensor([0.0] + [1.0] * (D - 1), dtype=F64),
    "geometric_1e-6": torch.logspace(0, -6, D, dtype=F64),
    "geometric_1e-12": torch.logspace(0, -12, D, dtype=F64),
    "clustered": torch.tensor([1.0 if n % 3 else 1e-4 for n in range(D)], dtype=F64),
}
roots = pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])


def stack(dtype: torch.dtype = F64) -> Tensor:
    made = torch.stack([compose(basis(D, 3), values) for values in SPECTRA.values()])
    return ((made + made.mT) / 2).to(dtype)


def exact(matrices: Tensor, p: int, ridge: Tensor) -> Tensor:
    """Return roots by an eigendecomposition in float64, with a given ridge [B, 1, 1]."""
    values, q = torch.linalg.eigh(matrices.double())
    return (q * (values.clamp_min(0.0) + ridge.flatten(1)).pow(-1.0 / p).unsqueeze(-2)) @ q.mT


@roots
def test_float64_roots_are_those_of_the_eigendecomposition(p: int) -> None:
    matrices = stack()
    found, failed = coupled_newton(matrices, p, 0.0, 1e-6)
    assert failed == []
    for name, root, expected in zip(SPECTRA, found, exact(matrices, p, 1e-6 * upper_bound(matrices)), strict=True):
        assert relative_error(root, expected) < 1e-9, name


@roots
@pytest.mark.parametrize("relative", [1e-6, 1e-4])
def test_float32_roots_are_right_within_the_rounding_of_the_matrix(p: int, relative: float) -> None:
    """As for eigh, dA moves the root by up to ||dA|| / (p * smallest eigenvalue), and dA is a few roundings."""
    matrices = stack(torch.float32)
    found, failed = coupled_newton(matrices, p, 0.0, relative)
    assert failed == []
    bound = upper_bound(matrices.double())
    for n, expected in enumerate(exact(matrices, p, relative * bound)):
        values = torch.linalg.eigvalsh(matrices[n].double())
        condition = (values.max() / (values.min().clamp_min(0) + relative * bound[n])).item()
        allowed = 16 * torch.finfo(torch.float32).eps * (math.sqrt(D) + condition / p)
        assert relative_error(found[n], expected) < allowed, list(SPECTRA)[n]


def test_what_gradients_see_of_a_float32_root_is_right() -> None:
    """That is the error of A^(-1/4) A^(1/2), because directions of small eigenvalues are those of small gradients."""
    matrices = stack(torch.float32)
    found, _ = coupled_newton(matrices, 4, 0.0, 1e-6)
    values, q = torch.linalg.eigh(matrices.double())
    half = (q * values.clamp_min(0).sqrt().unsqueeze(-2)) @ q.mT
    expected = exact(matrices, 4, 1e-6 * upper_bound(matrices.double()))
    for n, name in enumerate(SPECTRA):
        assert relative_error(found[n].double() @ half[n], expected[n] @ half[n]) < 5e-4, name


spectra = st.lists(st.floats(0, 1), min_size=1, max_size=30).filter(lambda values: max(values) > 1e-3)


@given(spectra, st.floats(-25, 25), st.integers(0, 99))
def test_the_scale_is_a_bound_of_the_largest_eigenvalue_and_close(values: list[float], scale: float, seed: int) -> None:
    d = len(values)
    matrix = compose(basis(d, seed), torch.tensor(values, dtype=F64) * 10.0**scale)
    bound, largest = upper_bound(matrix[None]).item(), max(values) * 10.0**scale
    assert largest * (1 - 1e-12) <= bound <= largest * d ** (1 / 128) * (1 + 1e-12)
    single = upper_bound(matrix.float()[None]).item()
    assert single == pytest.approx(bound, rel=1e-4)


def test_the_ridge_is_that_of_the_eigendecomposition_up_to_the_bound() -> None:
    matrices = stack()
    shifted, bound = with_ridge(matrices, 0.0, 1e-3)
    ridge = (shifted - matrices).diagonal(dim1=-2, dim2=-1).mean(-1)
    largest = torch.linalg.eigvalsh(matrices)[:, -1]
    assert ((ridge >= 1e-3 * largest * (1 - 1e-9)) & (ridge <= 1e-3 * largest * D ** (1 / 128) * (1 + 1e-9))).all()
    assert (torch.linalg.eigvalsh(shifted)[:, -1] <= bound.flatten() * (1 + 1e-12)).all()
    shifted, _ = with_ridge(matrices[:1], 0.5, 1e-3)
    torch.testing.assert_close(shifted, 1.5 * matrices[:1])


BAD = {
    "zero": torch.zeros(D, D),
    "nan": torch.full((D, D), math.nan),
    "infinite": torch.full((D, D), math.inf),
    "indefinite": compose(basis(D, 1), torch.linspace(-0.1, 1.0, D, dtype=F64)).float(),
    "negative": -torch.eye(D),
}


@roots
def test_a_matrix_that_cannot_converge_is_reported_and_changes_no_other(p: int) -> None:
    good = stack(torch.float32)
    mixed = torch.cat([torch.stack(list(BAD.values())), good])
    found, failed = coupled_newton(mixed, p, 0.0, 1e-5)
    assert failed == list(range(len(BAD)))
    alone, _ = coupled_newton(good, p, 0.0, 1e-5)
    torch.testing.assert_close(found[len(BAD) :], alone, rtol=1e-5, atol=0.0)


def test_rows_that_fail_fall_back_to_the_eigendecomposition() -> None:
    matrices = torch.cat([torch.stack([BAD["indefinite"], BAD["nan"], BAD["zero"]]), stack(torch.float32)])
    found, failed = inverse_root(matrices, 4.0, 0.0, 1e-5, torch.float32, "coupled_newton")
    assert failed == [1]
    expected, _ = inverse_root(matrices[[0, 2]], 4.0, 0.0, 1e-5, torch.float32)
    torch.testing.assert_close(found[[0, 2]], expected)
    iterated, _ = coupled_newton(matrices[3:], 4, 0.0, 1e-5)
    torch.testing.assert_close(found[3:], iterated, rtol=1e-5, atol=0.0)


def test_converged_matrices_are_removed_from_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identity takes few iterations and the rank-one matrix many, so later products have fewer matrices."""
    sizes: list[int] = []
    power = newton._whole_power

    def watched(matrices: Tensor, p: int) -> Tensor:
        if p == 4:
            sizes.append(len(matrices))
        return power(matrices, p)

    monkeypatch.setattr(newton, "_whole_power", watched)
    matrices = torch.stack([torch.eye(D), compose(basis(D, 0), SPECTRA["rank_one"]).float(), BAD["nan"]])
    _, failed = coupled_newton(matrices, 4, 0.0, 1e-6)
    assert failed == [2]
    assert sizes[0] == 2 and sizes[-1] == 1 and len(sizes) < 40


def test_an_iteration_that_never_ends_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(newton, "MAX_ITERATIONS", 5)
    found, failed = inverse_root(stack(), 4.0, 0.0, 1e-6, F64, "coupled_newton")
    assert failed == []
    assert coupled_newton(stack(), 4, 0.0, 1e-6)[1] != []
    torch.testing.assert_close(found, exact(stack(), 4, 1e-6 * torch.linalg.eigvalsh(stack())[:, -1:, None]))


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="torch 2.8 has the older switches alone"
)
def test_products_of_an_iteration_run_in_full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    backends: Any = torch.backends
    seen = set()

    def watched(matrices: Tensor, *rest: Any) -> Any:
        seen.add((backends.cuda.matmul.fp32_precision, torch.is_autocast_enabled("cpu")))
        return coupled_newton(matrices, *rest)

    monkeypatch.setattr("shampoo_deepspeed.linalg.inverse_root.coupled_newton", watched)
    backends.fp32_precision = "tf32"
    try:
        with torch.autocast("cpu"):
            inverse_root(stack(torch.float32), 4.0, 0.0, 1e-6, torch.float32, "coupled_newton")
        assert backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        backends.fp32_precision = "none"
    with full_precision("cpu"):
        assert seen == {("ieee", False)}


@pytest.mark.parametrize(
    ("solver", "device", "dtype", "p", "relative", "damping", "expected"),
    [
        ("auto", "cpu", torch.float32, 4.0, 1e-6, "shift", "eigh"),
        ("auto", "meta", torch.float32, 4.0, 1e-6, "shift", "coupled_newton"),
        ("auto", "meta", torch.float32, 6.0, 1e-6, "shift", "coupled_newton"),
        ("auto", "meta", torch.float32, 4.5, 1e-6, "shift", "eigh"),
        ("auto", "meta", torch.float32, 4.0, 1e-8, "shift", "eigh"),
        ("auto", "meta", F64, 4.0, 1e-8, "shift", "coupled_newton"),
        ("auto", "meta", torch.float32, 4.0, 1e-6, "cutoff", "eigh"),
        ("auto", "meta", torch.float32, 4.0, 1e-6, "saturate", "eigh"),
        ("eigh", "meta", torch.float32, 4.0, 1e-6, "shift", "eigh"),
        ("coupled_newton", "cpu", torch.float32, 6.0, 1e-6, "shift", "coupled_newton"),
        ("coupled_newton", "cpu", torch.float32, 0.5, 1e-6, "shift", "eigh"),
    ],
)
def test_the_solver_is_chosen_by_device_root_and_ridge(
    solver: str, device: str, dtype: torch.dtype, p: float, relative: float, damping: str, expected: str
) -> None:
    work = torch.empty(2, 8, 8, dtype=dtype, device=device)
    assert chosen_solver(solver, work, p, relative, damping) == expected


@pytest.mark.parametrize("root", [2.5, 0.5])
def test_a_root_that_the_chosen_solver_cannot_take_is_an_error(root: float) -> None:
    with pytest.raises(OptionError, match=f"'solver' = 'coupled_newton'.*exponent_override = {root}"):
        ShampooConfig(preconditioner="shampoo", solver="coupled_newton", exponent_override=root)
    ShampooConfig(preconditioner="shampoo", solver="coupled_newton", exponent_override=4)


def test_a_whole_run_is_that_of_the_eigendecomposition() -> None:
    by_eigh, iterated = parameter(12, 10, dtype=F64), parameter(12, 10, dtype=F64)
    options: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64", "relative_epsilon": 1e-4}
    drive(shampoo([by_eigh], **options), [by_eigh], range(10))
    start = snapshot([parameter(12, 10, dtype=F64)])[0]
    drive(shampoo([iterated], solver="coupled_newton", **options), [iterated], range(10))
    assert 0.0 < relative_error(iterated.detach() - start, by_eigh.detach() - start) < 1e-4
