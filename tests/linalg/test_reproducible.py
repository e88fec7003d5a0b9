"""A block's result depends only on its values, not on its neighbours in a stack or its place in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.block_stack import BlockStack, _normalize_
from shampoo_deepspeed.algorithm.grafting import strengths
from shampoo_deepspeed.linalg.eigenbases import eigenbasis, power_step, rayleigh, renewed
from shampoo_deepspeed.linalg.inverse_root import diagonal_root, inverse_root, shrunk
from shampoo_deepspeed.linalg.mode_products import add_gram_, bmm, multiply_modes
from shampoo_deepspeed.linalg.orthogonalise import orthogonalised
from shampoo_deepspeed.linalg.precision import LANES, UNDIVIDED, elementwise, power
from tests.support.bare import BARE

ROWS = 5
SIZES = (1, 2, 3, 7, 16, 17, 33, 63, 65)
DTYPES = (torch.float32, torch.float64)
PRODUCT_DIMS = (1, 2, 3, 5, 8, 13, 16, 17, 40, 63, 96, 127, 130)
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "defaults_sampled": {"refresh_growth": 0.0},  # every second gradient from the third step on
    "plain": BARE,
    "other_root": {"preconditioner": "shampoo", "exponent_override": 2.7},
    "coupled_newton": {"preconditioner": "shampoo", "solver": "coupled_newton", "exponent_override": 3.0},
    "cutoff": {"preconditioner": "shampoo", "damping": "cutoff", "relative_epsilon": 1e-4},
    "kl_saturate": {"damping": "saturate", "relative_epsilon": 1e-2, "shrinkage": 0.5},
    "saturate": {"preconditioner": "shampoo", "damping": "saturate", "relative_epsilon": 1e-2, "shrinkage": 0.5},
    "tolerance": {"preconditioner": "shampoo", "refresh_tolerance": 0.1},
    "ungrafted": {"grafting": "none", "beta3": 0.4},
    "rmsprop": {"grafting": "rmsprop", "eps": 0.0},
    "normalized": {"grafting": "normalized_adam"},
    "gradients_as_they_are": {"normalize_gradients": False},
    "diagonals": {"preconditioner": "shampoo", "large_dim": "diagonal", "max_preconditioner_dim": 32},
    "narrow_products": {"apply_dtype": "bfloat16", "root_dtype": "bfloat16"},
    "background": {"refresh": "background"},
    "kl_coupled_newton": {"solver": "coupled_newton"},
    "kl_in_float64": {"relative_epsilon": 1e-6, "early_relative_epsilon": 0.0},
    "kl_tolerance": {"preconditioner": "kl_shampoo", "refresh_tolerance": 0.1},
    "qr": {"preconditioner": "shampoo", "solver": "qr"},
    "kl_qr": {"solver": "qr"},
    "soap_eigh": {"preconditioner": "soap", "solver": "eigh"},
    "soap": {"preconditioner": "soap"},
    "soap_other_root": {"preconditioner": "soap", "exponent_override": 3.0},
    "soap_grafted": {"preconditioner": "soap", "grafting": "adam", "apply_dtype": "bfloat16"},
    "kl_soap": {"preconditioner": "kl_soap"},
    "soap_muon": {"preconditioner": "soap_muon"},
    "muon": {"preconditioner": "muon"},
    "muon_ungrafted": {"preconditioner": "muon", "grafting": "none", "normalize_gradients": False},
    "shampoo_rms": {"preconditioner": "shampoo", "grafting": "rms"},
    "soap_rms": {"preconditioner": "soap", "grafting": "rms"},
}
SHAPES = [(7, 5), (17, 33), (63, 16), (3, 5, 7), (65, 65)]
# How a library splits sums depends on sizes and dtypes, not on options, so each option has three of the shapes.
CASES = [
    (name, SHAPES[(number + n) % len(SHAPES)], DTYPES[(number + n // 2) % 2])
    for number, name in enumerate(OPTIONS)
    for n in (0, 1, 3)
]


def gradients(shape: tuple[int, ...], step: int, dtype: torch.dtype) -> Tensor:
    """Return gradients [ROWS, *shape], with another scale in each row."""
    generator = torch.Generator().manual_seed(step)
    scale = torch.logspace(-3, 2, ROWS, dtype=torch.float64).view(-1, *[1] * len(shape))
    return (torch.randn(ROWS, *shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def stepped(rows: range, shape: tuple[int, ...], options: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return all state of a stack with these rows after some steps, and its last updates."""
    config = ShampooConfig(precondition_frequency=2, **options)
    stack = BlockStack([f"a/{row}" for row in rows], shape, config, torch.device("cpu"), dtype)
    accepted, made = None, torch.empty(0)
    for step in range(1, 8):
        given = gradients(shape, step, dtype)[rows.start : rows.stop].clone()
        made = stack.step(0, given, [step] * len(rows), config, accepted).clone()
    return {**stack.tensors, "updates": made}


@pytest.mark.slow
@pytest.mark.parametrize("option, shape, dtype", CASES, ids=str)
def test_a_block_in_a_stack_steps_as_it_does_alone(option: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    together = stepped(range(ROWS), shape, OPTIONS[option], dtype)
    for row in range(ROWS):
        alone = stepped(range(row, row + 1), shape, OPTIONS[option], dtype)
        for name, tensor in together.items():
            assert torch.equal(tensor[row], alone[name][0]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(7, 5), (130, 300)])
def test_a_gradient_is_normalized_alike_next_to_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Squares of one block overflow, of one they underflow, and one is zero."""
    scales = torch.tensor([1e-30, 1.0, 0.0, 1e20, 1e-3], dtype=dtype).view(-1, 1, 1)
    stack = gradients(shape, 1, dtype) * scales
    together = stack.clone()
    means = _normalize_(together, 1e-8)
    assert means is not None
    factors = strengths(means, 1e-8)
    for row in range(ROWS):
        alone = stack[row : row + 1].clone()
        mean = _normalize_(alone, 1e-8)
        one = torch.ones(1, 1, 1, dtype=dtype)
        assert torch.equal(together[row], alone[0])
        assert torch.equal(factors[row : row + 1], one if mean is None else strengths(mean, 1e-8))
    wanted = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0], dtype=dtype)
    torch.testing.assert_close(together.square().mean((1, 2)).sqrt(), wanted)


def covariances(d: int, dtype: torch.dtype) -> Tensor:
    unfolded = gradients((d, d + 3), d, dtype)
    return unfolded @ unfolded.mT / (d + 3)


def one_basis(stack: Tensor) -> Tensor:
    """Return the same orthonormal basis for every matrix of a stack."""
    d = stack.shape[-1]
    return torch.linalg.qr(covariances(d, stack.dtype)[0])[0].expand_as(stack).contiguous()


FUNCTIONS: dict[str, Callable[[Tensor], tuple[Tensor, ...]]] = {
    "root": lambda a: inverse_root(a, 4.0, 0.0, 1e-6, a.dtype)[:1],
    "root_in_float64": lambda a: inverse_root(a, 2.0, 0.0, 1e-6, a.dtype, in_float64=True)[:1],
    "odd_root": lambda a: inverse_root(a, 3.3, 0.0, 1e-6, a.dtype)[:1],
    "coupled_newton": lambda a: inverse_root(a, 4.0, 0.0, 1e-4, a.dtype, "coupled_newton")[:1],
    "diagonal_root": lambda a: diagonal_root(a[..., 0].abs(), 3.0, 0.0, 1e-6, a.dtype, "shift")[:1],
    "saturated_root": lambda a: inverse_root(a, 2.0, 0.0, 1e-3, a.dtype, damping="saturate")[:1],
    "orthogonalised": lambda a: (orthogonalised(a), orthogonalised(a[:, :, : a.shape[-1] // 2 + 1])),
    "shrunk": lambda a: (shrunk(a, 0.3), shrunk(a[..., 0], 0.3)),
    "eigenbasis": lambda a: eigenbasis(a)[:2],
    "power_step": lambda a: power_step(a, one_basis(a), 1e-6),
    "rayleigh": lambda a: (rayleigh(a, one_basis(a)),),
    "kept_or_new": lambda a: renewed(a, one_basis(a), 0, 0.3)[:3],
    "tracked": lambda a: renewed(a, one_basis(a), 2, 0.3, 1e-4)[:3],
}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("d", [*SIZES, 127, 129, 255])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_a_matrix_in_a_batch_gives_what_it_does_alone(
    function: Callable[[Tensor], tuple[Tensor, ...]], d: int, dtype: torch.dtype
) -> None:
    matrices = covariances(d, dtype)
    batch = function(matrices)
    for row in range(ROWS):
        for whole, alone in zip(batch, function(matrices[row : row + 1].clone()), strict=True):
            assert torch.equal(whole[row], alone[0])


@pytest.mark.parametrize("length", [40_000, 200_001])
def test_a_long_diagonal_is_shrunk_alike_alone_and_in_a_stack(length: int) -> None:
    """Torch's own mean divides a single row of this length among threads, and so rounds in another order."""
    diagonals = torch.rand(3, length, generator=torch.Generator().manual_seed(3))
    together = shrunk(diagonals, 0.3)
    torch.testing.assert_close(together, 0.7 * diagonals + 0.3 * diagonals.mean(-1, keepdim=True))
    for row in range(3):
        assert torch.equal(shrunk(diagonals[row : row + 1].clone(), 0.3)[0], together[row])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Draw two stacks [ROWS, m, k] and [ROWS, k, n], each plain or transposed, at any place in memory."""
    m, k, n = draw(st.tuples(*[st.sampled_from(PRODUCT_DIMS)] * 3))
    dtype = draw(st.sampled_from(DTYPES))
    return draw(placed(m, k, dtype)), draw(placed(k, n, dtype))


@st.composite
def placed(draw: st.DrawFn, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    transposed, offset, seed = draw(st.booleans()), draw(st.integers(0, 15)), draw(st.integers(0, 99))
    shape = (ROWS, columns, rows) if transposed else (ROWS, rows, columns)
    values = torch.randn(ROWS * rows * columns + 16, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    stack = values[offset : offset + ROWS * rows * columns].view(shape)
    return stack.mT if transposed else stack


@given(pairs())
def test_a_product_depends_on_its_two_matrices_alone(pair: tuple[Tensor, Tensor]) -> None:
    left, right = pair
    together = bmm(left, right)
    torch.testing.assert_close(together, torch.einsum("bmk,bkn->bmn", left, right), rtol=1e-4, atol=1e-4)
    for row in range(ROWS):
        alone = bmm(own_memory(left, row), own_memory(right, row))
        assert torch.equal(together[row], alone[0])


def own_memory(stack: Tensor, row: int) -> Tensor:
    """Return one matrix as its own stack, at the start of new memory, and transposed if it was."""
    return stack[row : row + 1].clone(memory_format=torch.preserve_format)


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("shape", [(129, 127), (144, 128), (200, 90), (128, 131), (1, 70), (70, 1), (70,), (6, 5, 33)])
def test_mode_products_and_statistics_depend_on_their_block_alone(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    blocks = gradients(shape, 1, dtype)
    matrices = {mode: covariances(d, dtype) for mode, d in enumerate(shape)}
    moved = multiply_modes(blocks, matrices)
    for mode in matrices:
        add_gram_(matrices[mode], blocks, mode, 0.9, 0.1)
    for row in range(ROWS):
        block, own = blocks[row : row + 1].clone(), {mode: covariances(d, dtype)[row : row + 1].clone()
                                                     for mode, d in enumerate(shape)}  # fmt: skip
        assert torch.equal(moved[row], multiply_modes(block, own)[0])
        for mode, matrix in own.items():
            add_gram_(matrix, block, mode, 0.9, 0.1)
            assert torch.equal(matrices[mode][row].tril(), matrix[0].tril())


@pytest.mark.parametrize("at_fault", [torch.nan, torch.inf])
def test_a_matrix_that_cannot_be_decomposed_changes_no_bit_of_the_others(at_fault: float) -> None:
    matrices = covariances(17, torch.float32)
    alone = inverse_root(matrices[[0, 2, 3, 4]], 4.0, 0.0, 1e-6, torch.float32)[0]
    basis = eigenbasis(matrices[[0, 2, 3, 4]])[1]
    matrices[1, 3, 2] = at_fault
    roots, failed = inverse_root(matrices, 4.0, 0.0, 1e-6, torch.float32)
    assert failed == [1] and torch.equal(roots[[0, 2, 3, 4]], alone)
    bases = eigenbasis(matrices)
    assert bases[2] == [1] and torch.equal(bases[1][[0, 2, 3, 4]], basis)


@pytest.mark.parametrize("length", [1, 5, LANES - 1, LANES, 1000, UNDIVIDED + 3, 3 * UNDIVIDED + 77])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("function", [lambda x: power(x, -0.25), lambda x: power(x, 0.3), lambda x: power(x, -0.5),
                                      lambda x: elementwise(torch.log, x)])  # fmt: skip
def test_an_element_gives_the_same_at_every_place(
    function: Callable[[Tensor], Tensor], dtype: torch.dtype, length: int
) -> None:
    values = torch.rand(length, generator=torch.Generator().manual_seed(length), dtype=torch.float64).add(0.1).to(dtype)
    whole = function(values)
    for start in {0, 1, 3, length // 2, length - 1} & set(range(length)):
        assert torch.equal(function(values[start:].clone()), whole[start:])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("method", ["adam", "rmsprop", "adagrad"])
@pytest.mark.parametrize("length", [1, 31, 129, 70_001])
def test_an_element_of_an_unpreconditioned_parameter_steps_the_same_at_every_place(
    length: int, method: str, dtype: torch.dtype
) -> None:
    """This holds for any cut of a parameter into shards."""
    config, accepted = ShampooConfig(), None

    def run(cuts: list[int]) -> Tensor:
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        first, second = ([torch.zeros(n, dtype=dtype) for n in sizes] for _ in range(2))
        made: list[Tensor] = []
        for step in range(1, 4):
            whole = torch.randn(length, generator=torch.Generator().manual_seed(step), dtype=torch.float64).to(dtype)
            parts = list(torch.split(whole, sizes))
            made = grafting.advance(method, first, second, parts, parts, step, config, accepted).updates
        return torch.cat([*first, *second, *made])

    def rejoined(cuts: list[int]) -> Tensor:
        sizes = [b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True)]
        return torch.cat([torch.cat(kind.split(sizes)) for kind in run(cuts).split(length)])

    for cuts in ([1], [length // 3], [length // 3, length // 2 + 1]):
        if length > 1:
            assert torch.equal(rejoined(cuts), run([]))
