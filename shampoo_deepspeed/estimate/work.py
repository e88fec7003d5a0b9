"""What a step of a block is on an accelerator: FLOPs by kind, bytes, launches, reads. Plain arithmetic.

FLOPs of products follow from the rule. Passes and launches are those of the code, so they are numbers in a table.
`tests/estimate/test_work.py` holds all of them to what a counter of operators sees in real steps on a simulated
accelerator, for each rule, solver and precision. Passes and launches are those of matrices under the default options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from shampoo_deepspeed.linalg.cholesky_qr import PASSES
from shampoo_deepspeed.linalg.inverse_root import chosen_solver
from shampoo_deepspeed.linalg.newton import iterations
from shampoo_deepspeed.linalg.orthogonalise import ITERATIONS
from shampoo_deepspeed.options.config import ShampooConfig

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes.

    Args:
        lowered: FLOPs of products in ``matmul_precision``.
        full: FLOPs of products in float32.
        factorizations: FLOPs of Cholesky factors (d^3 / 3) and triangular solves (d^3).
        decomposed: d^3 of all eigendecomposed matrices.
        lowered_bytes: operands and results of the first products.
        full_bytes: those of the second.
        nbytes: tensors that all other operators read or write; one that is changed in place counts once.
    """

    lowered: float = 0.0
    full: float = 0.0
    factorizations: float = 0.0
    decomposed: float = 0.0
    lowered_bytes: float = 0.0
    full_bytes: float = 0.0
    nbytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def times(self, factor: float) -> Work:
        """So many times this work."""
        return Work(*(factor * getattr(self, f.name) for f in fields(self)))


class Passes(NamedTuple):
    """How often a step without refresh goes over a block, and how many operators it launches for a stack.

    Each is a number for the step, and one for each mode whose factor matrix gets the gradient in it.
    """

    elements: float
    elements_of_mode: float
    launches: int
    launches_of_mode: int


# By (whether statistics are whitened, whether updates are made in a basis); Muon has no statistics.
PLAIN: dict[tuple[bool, bool], Passes] = {
    (False, False): Passes(9.0, 0.0, 19, 1),
    (True, False): Passes(11.0, 0.0, 20, 2),
    (False, True): Passes(19.0, 0.0, 27, 1),
    (True, True): Passes(19.0, 5.0, 27, 5),
}
MUON = Passes(8.0, 0.0, 15, 0)
# An iteration of Newton-Schulz is three products.
ITERATION_LAUNCHES = 3
# What is orthogonalised, SOAP's update or Muon's moment, is scaled before, has Nesterov's momentum and a given length.
ORTHOGONALISED = Passes(7.0, 0.0, 6, 0)
# A given length takes an operator more than a bound of the length does.
GIVEN_LENGTH_LAUNCHES = 1


class Refresh(NamedTuple):
    """A refresh of all modes of a stack of matrices that have been refreshed before. Nothing is read in it.

    Args:
        products: products of d x d matrices for each mode.
        passes: over each factor matrix.
        elements: over the block.
        launches: operators for the stack.
        launches_each: operators for the modes of one size, which are computed together.
    """

    products: float
    passes: float
    elements: float
    launches: int
    launches_each: int = 0


# By solver: of Shampoo's roots, and what the KL rules' scaling adds (coupled Newton's is that of eigh).
ROOTS = {"eigh": Refresh(2.0, 20.35, 0.0, 82), "qr": Refresh(6.0, 39.4, 0.0, 20, 24)}
SCALED = {"eigh": Refresh(0.0, 4.65, 0.0, 24), "qr": Refresh(0.0, 0.0, 0.0, 8, 1)}
# Of bases, and of KL-SOAP's eigenvalues. First moments are rotated back and forth: two products with the block a mode.
BASES = {"eigh": Refresh(2.0, 34.2, 19.5, 4, 16), "qr": Refresh(4.0, 32.2, 19.2, 20, 19)}
WHITENED = Refresh(1.0, 3.3, 0.0, 16, 4)
# Several modes of one size are one stack: their bases are copied. Eigenvalues of fewer columns are filled up.
JOINED_LAUNCHES, JOINED_PASSES, FILLED_LAUNCHES = 1, 2.0, 1
# An eigendecomposition in float64 is one of a matrix at a time: launches for each block, both modes.
ONE_BY_ONE_LAUNCHES = 28
# KL-Shampoo's with a small ridge computes the whole root so. The numbers are instead of those of `ROOTS` and `SCALED`.
WIDE_ROOTS, WIDE_LAUNCHES, WIDE_BYTES = Refresh(2.0, 45.9, 0.0, 36), 74, 2.0


class Newton(NamedTuple):
    """An iterative solver: launches and passes over each matrix for each mode, and launches of an iteration."""

    launches: int
    launches_each: int
    passes: float


COUPLED = {True: Newton(66, 5, 51.0), False: Newton(67, 4, 50.4)}  # whether the root is 4
QR_ON_CPU = 0.7
BOUND = 6  # products of the bound of the largest eigenvalue
# Passes of an iteration over each matrix, and over one that all blocks of a batch share: identities.
NEWTON_PASSES, SHARED_PASSES, SHARED_AT_FIRST = 2.0, 1.0, 8.0
SHARED_IF_SCALED = 2.0
# Of a step, apart from its stacks: once, for each bucket, for each further stack in a bucket, and for the element-wise
# part. Passes over preconditioned elements on the ranks that hold them, and over element-wise ones with their update.
STEP_LAUNCHES, BUCKET_LAUNCHES, STACK_LAUNCHES, ELEMENTWISE_LAUNCHES = 24, 3, 1, 28
HELD_PASSES, ELEMENTWISE_PASSES = 8.0, 17.0
# With several buckets updates are applied as they come: the kernel that does it takes the place of a copy into a
# buffer, two passes less. Blocks that are strided in their weights are copied out and back instead, as many passes
# more, so that the mean is that of one bucket.
AT_ONCE_LAUNCHES = 1
# What a decay costs that a rejected step must not apply: a number once in a step, of second moments in a basis two, and
# an operator for each factor matrix that gets the gradient.
GUARD_LAUNCHES = 2
ADAMW_PASSES = 7.0  # fused: weights, gradient and two moments are read, all but the gradient written


def factor_dims(shape: tuple[int, ...], config: ShampooConfig) -> list[int]:
    """The dims of a block that have a factor matrix."""
    return [d for d, side in zip(shape, config.sides(shape), strict=True) if side == "matrix"]


def solver_in_force(config: ShampooConfig, count: int, accelerator: bool = True) -> str:
    """The solver of a block with so many factor matrices: eigh, qr or coupled_newton."""
    if config.tracks_basis:
        return "qr"
    if config.parts.in_basis or config.keeps_basis:
        return "eigh"
    unused = torch.empty(0, device="meta" if accelerator else "cpu")
    return chosen_solver(config.solver, unused, config.root(count), config.relative_epsilon, config.damping)


def _roots_in_float64(config: ShampooConfig, solver: str) -> bool:
    return solver == "eigh" and config.decomposes_in_float64 and not config.parts.in_basis and not config.keeps_basis


def plain_work(shape: tuple[int, ...], config: ShampooConfig) -> Work:
    """A block's step without a refresh; the mean of the steps if not every gradient goes into the factors."""
    numel, dims = math.prod(shape), factor_dims(shape, config)
    parts, work = config.parts, Work()
    if parts.statistics:
        modes = 1.0 / config.sampling
        for d in dims:
            work += _gram(numel, d, config.matmul_precision).times(modes)
            if parts.whitens:  # each mode along all others, so each is a side of all others but itself
                work += _along(numel, d, config.matmul_precision).times(modes * (len(dims) - 1))
        precision = "highest" if parts.orthogonalises else config.matmul_precision
        for d in dims:
            along = _along(numel, d, precision).times(2.0 if parts.in_basis else 1.0)
            work += _in_full(along) if parts.orthogonalises else along
        passes = PLAIN[parts.whitens, parts.in_basis]
        work += Work(nbytes=FLOAT * numel * (passes.elements + passes.elements_of_mode * len(dims) * modes))
    else:
        work += Work(nbytes=FLOAT * numel * MUON.elements)
    return work + (_orthogonalisation(shape, config) if parts.orthogonalises else Work())


def _gram(numel: int, d: int, precision: str) -> Work:
    """One statistics product. Of bfloat16 operands, which are passes of their own, so is the sum."""
    narrow = precision == "medium"
    return Work(
        lowered=2.0 * d * numel,
        lowered_bytes=FLOAT * ((1.0 if narrow else 2.0) * numel + d * d),
        nbytes=FLOAT * 3.0 * (numel + d * d) if narrow else 0.0,
    )


def _along(numel: int, d: int, precision: str) -> Work:
    """One product of a block with a root or basis along a mode."""
    narrow = precision == "medium"
    moved = 1.5 * numel + 0.5 * d * d if narrow else 2.0 * numel + d * d
    return Work(
        lowered=2.0 * d * numel,
        lowered_bytes=FLOAT * moved,
        nbytes=FLOAT * 1.5 * (numel + d * d) if narrow else 0.0,
    )


def _in_full(work: Work) -> Work:
    """The same work with its products in float32."""
    return Work(full=work.lowered, full_bytes=work.lowered_bytes, nbytes=work.nbytes)


def _orthogonalisation(shape: tuple[int, ...], config: ShampooConfig) -> Work:
    rows = shape[config.batch_dims]
    numel = math.prod(shape[config.batch_dims :])
    short, long = sorted((rows, numel // rows))
    batch = math.prod(shape[: config.batch_dims])
    return Work(
        full=batch * ITERATIONS * 2.0 * (2.0 * short * short * long + short**3),
        full_bytes=batch * ITERATIONS * FLOAT * 4.0 * (numel + short * short),
        nbytes=batch * FLOAT * ORTHOGONALISED.elements * numel,
    )


def plain_launches(config: ShampooConfig, order: int) -> float:
    """Operators of a stack's step without a refresh, for blocks with so many factor matrices."""
    parts = config.parts
    if not parts.statistics:
        return MUON.launches + ITERATIONS * ITERATION_LAUNCHES + ORTHOGONALISED.launches
    passes, modes = PLAIN[parts.whitens, parts.in_basis], order / config.sampling
    launches = passes.launches + passes.launches_of_mode * modes
    narrow = config.matmul_precision == "medium"
    launches += 4 * modes * narrow  # the sum, and the operands
    if parts.whitens:
        launches += 2 * modes * (order - 1) * narrow
    if parts.orthogonalises:
        return launches + ITERATIONS * ITERATION_LAUNCHES + ORTHOGONALISED.launches + GIVEN_LENGTH_LAUNCHES
    return launches + 2 * order * (2 if parts.in_basis else 1) * narrow


def guarded_work(shape: tuple[int, ...], config: ShampooConfig) -> Work:
    """What a block's step does in addition, because the step may be rejected: decays are passes of their own."""
    if not config.parts.statistics:
        return Work()
    return Work(nbytes=FLOAT * sum(float(d) ** 2 for d in factor_dims(shape, config)) / config.sampling)


def guarded_launches(config: ShampooConfig, order: int) -> tuple[float, float]:
    """Operators for that: (of each stack, once in a step)."""
    parts = config.parts
    if not parts.statistics:
        return 0.0, 0.0
    return order / config.sampling, float(GUARD_LAUNCHES * (1 + 2 * parts.in_basis))


def refresh_work(
    shape: tuple[int, ...], config: ShampooConfig, batch: float = math.inf, accelerator: bool = True
) -> Work:
    """A block's refresh among ``batch`` together, on top of the step; zero without factor matrices.

    A CPU's QR decomposition counts as 0.7 eigendecompositions, its measured time (docs/solvers.md).
    """
    numel, dims, parts = math.prod(shape), factor_dims(shape, config), config.parts
    if not parts.statistics or not dims:
        return Work()
    solver, count = solver_in_force(config, len(dims), accelerator), len(dims)
    cubes, squares = sum(float(d) ** 3 for d in dims), sum(float(d) ** 2 for d in dims)
    table = BASES if parts.in_basis else ROOTS
    if solver in table:
        found, extra = table[solver], WHITENED if parts.in_basis else SCALED[solver]
        products = found.products + (extra.products if parts.whitens else 0.0)
        passes = found.passes + (extra.passes if parts.whitens else 0.0)
        moved = _bytes_of(solver, parts.in_basis, parts.whitens)
        if solver == "qr" and len(set(dims)) < count:
            passes += JOINED_PASSES
        if _roots_in_float64(config, solver):
            passes, moved = WIDE_ROOTS.passes + 2.0 / batch, WIDE_BYTES * moved
        work = Work(full=2.0 * products * cubes, full_bytes=FLOAT * moved * squares)
        work += Work(nbytes=FLOAT * (passes * squares + found.elements * numel))
        if solver == "qr" and not accelerator:
            in_passes = Work(full=-2.0 * PASSES * cubes, full_bytes=-FLOAT * 2.0 * PASSES * squares)
            work += in_passes + Work(decomposed=QR_ON_CPU * cubes)
        elif solver == "qr":
            work += Work(factorizations=PASSES * 4.0 / 3.0 * cubes)
        else:
            work += Work(decomposed=cubes)
        if parts.in_basis:
            turned = 2.0 * sum(2.0 * d * numel for d in dims)
            work += Work(full=turned, full_bytes=FLOAT * 2.0 * sum(2.0 * numel + d * d for d in dims))
        return work
    root = round(config.root(count))
    # The CPU may read when a matrix has converged; the last step computes X alone.
    steps = iterations(root, config.relative_epsilon) - (not accelerator)
    newton = COUPLED[root == 4]
    products = BOUND + steps * _products_of_iteration(root) + 1
    passes = newton.passes + steps * NEWTON_PASSES + (SCALED["eigh"].passes if parts.whitens else 0.0)
    passes += (SHARED_AT_FIRST + SHARED_IF_SCALED * parts.whitens + steps * SHARED_PASSES) / batch
    squarings = BOUND + steps * (root.bit_length() - 1)
    moved = 3.0 * products - squarings  # these read one matrix
    return Work(full=2.0 * products * cubes, full_bytes=FLOAT * moved * squares, nbytes=FLOAT * passes * squares)


def _products_of_iteration(root: int) -> int:
    """Products of an iteration: X E, the power of E by squarings, and its product with M."""
    return 2 + root.bit_length() - 1 + bin(root).count("1") - 1


def _bytes_of(solver: str, in_basis: bool, whitens: bool) -> float:
    """Passes of a refresh's products over each factor matrix; a product of a matrix with itself reads it once."""
    if in_basis:
        return (12.0 if solver == "qr" else 6.0 + 3.0) + (3.0 if whitens else 0.0)
    return 18.0 if solver == "qr" else 6.0


def refresh_launches(config: ShampooConfig, dims: Sequence[int], batch: float, accelerator: bool = True) -> float:
    """Operators of a refresh of so many blocks together, whose factor matrices have these dims."""
    parts, solver, order = config.parts, solver_in_force(config, len(dims), accelerator), len(dims)
    table = BASES if parts.in_basis else ROOTS
    if solver not in table:
        root = round(config.root(order))
        newton = COUPLED[root == 4]
        of_mode = newton.launches + iterations(root, config.relative_epsilon) * newton.launches_each
        return float(order * of_mode + SCALED["eigh"].launches * parts.whitens)
    if _roots_in_float64(config, solver):
        return WIDE_ROOTS.launches + WIDE_LAUNCHES * batch
    extra = WHITENED if parts.in_basis else SCALED[solver]
    sizes = len(set(dims)) if solver == "qr" else order
    launches = table[solver].launches + sizes * table[solver].launches_each
    launches += parts.whitens * (extra.launches + sizes * extra.launches_each)
    if solver == "qr":
        launches += JOINED_LAUNCHES * sum(dims.count(d) > 1 for d in set(dims))
    if parts.whitens or not parts.in_basis:
        launches += FILLED_LAUNCHES * sum(d < max(dims) for d in set(dims)) * (solver == "qr" or parts.in_basis)
    return launches + ONE_BY_ONE_LAUNCHES * batch * (parts.in_basis and solver == "eigh")


def refresh_waits(config: ShampooConfig, dims: Sequence[int], batch: float) -> float:
    """How often that refresh waits for an accelerator: where torch's own ``eigh`` looks for errors."""
    if solver_in_force(config, len(dims)) != "eigh":
        return 0.0
    alone = config.parts.in_basis or _roots_in_float64(config, "eigh")
    return float(len(dims) * (batch if alone else 1.0))
