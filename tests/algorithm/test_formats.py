"""Formats of state: error bounds, what they keep exactly, and random rounding: its mean and the bits of all devices."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_deepspeed.algorithm import formats
from shampoo_deepspeed.algorithm.formats import Form, random_bits, salts_of, seeds_of, stored_forms
from tests.support import narrow
from tests.support.largest import Largest
from tests.support.stepping import same_bits

CPU = torch.device("cpu")
F32 = torch.float32
SYMMETRIC = ("factor_0", "root_1")
OTHERS = ("basis_0", "exp_avg", "rotated_exp_avg", "second_moment", "rotated_second_moment")
KEYS = ("layer.weight/0", "layer.weight/1", "head/7")
numbers = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**120), max_value=2.0**120)


def seeds(name: str, step: int = 3) -> Tensor:
    return seeds_of(salts_of(KEYS, CPU), name, step)


def form(name: str, shape: tuple[int, ...], kind: str) -> Form:
    return Form(name, shape, F32, kind, name in SYMMETRIC)


def through(made: Form, values: Tensor, bits: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
    """Return the stored tensors of these rows, and what is read from them."""
    stored = made.new(len(values), CPU)
    made.encode_(stored, values, bits)
    return stored, made.decode(stored)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Form, Tensor, bool]:
    """Draw a form, rows for it of any scales, and whether to round at random."""
    name = draw(st.sampled_from(SYMMETRIC + OTHERS))
    kind = draw(st.sampled_from(["packed", "bfloat16", "int8"] if name in SYMMETRIC else ["bfloat16", "int8"]))
    d = draw(st.integers(1, 9))
    shape = (d, d) if name in SYMMETRIC else (d, draw(st.integers(1, 50)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    values = torch.randn(len(KEYS), *shape, generator=generator)
    values *= torch.exp2(torch.randint(-40, 40, values.shape, generator=generator) * draw(st.integers(0, 1)))
    values *= 2.0 ** draw(st.integers(-60, 60))
    values[torch.rand(values.shape, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = 0.0
    if name in SYMMETRIC:
        values = values.tril() + values.tril(-1).mT
    return form(name, shape, kind), values.abs() if "second" in name else values, draw(st.booleans())


def bound(made: Form, values: Tensor, at_random: bool) -> Tensor:
    """Return the largest error that the description of the formats allows, element by element."""
    share = 1.0 if at_random else 0.5
    if made.format == "packed":
        return torch.zeros_like(values)
    if made.format == "bfloat16":
        return values.abs() * 2.0**-7 * share
    if made.squares:  # three bits after the first, and a floor 30 octaves below the largest
        return values / 8.0 + values.amax((1, 2), keepdim=True) * 2.0**-29
    # Two scales of a largest magnitude that is above 127 scales; to nearest one.
    return values.abs().amax((1, 2), keepdim=True).expand_as(values) / (63.5 if at_random else 127.0)


@given(cases())
def test_errors_are_bounded_and_signs_zeros_and_symmetry_are_kept(case: tuple[Form, Tensor, bool]) -> None:
    made, values, at_random = case
    _, found = through(made, values, seeds(made.name) if at_random else None)
    assert found.shape == values.shape and found.dtype == values.dtype
    assert (found - values).abs().le(bound(made, values, at_random)).all()
    assert (found[values == 0.0] == 0.0).all()
    assert (found * values.sign() >= 0.0).all()
    if made.squares:
        assert (found[values > 0.0] > 0.0).all()
    if made.symmetric:
        assert torch.equal(found, found.mT)
        if made.format == "int8":
            assert torch.equal(*(x.diagonal(dim1=1, dim2=2) for x in (found, values)))


@given(cases())
def test_what_was_read_is_stored_unchanged(case: tuple[Form, Tensor, bool]) -> None:
    """So a step that is rejected on the device changes nothing, whatever its random bits are."""
    made, values, at_random = case
    stored, found = through(made, values, seeds(made.name) if at_random else None)
    for again in (None, seeds(made.name, 4), seeds(made.name, 5)):
        assert same_bits(through(made, found, again)[0], stored)


@given(cases())
def test_each_row_is_what_the_oracle_keeps(case: tuple[Form, Tensor, bool]) -> None:
    made, values, at_random = case
    _, found = through(made, values, seeds(made.name) if at_random else None)
    for row, key in enumerate(KEYS):
        wanted = narrow.kept(values[row], made.format, made.name, (key, 3) if at_random else None)
        assert torch.equal(found[row], wanted)


@given(cases(), st.sampled_from([32, 64, 96]))
def test_pieces_and_other_rows_change_nothing(case: tuple[Form, Tensor, bool], piece: int) -> None:
    made, values, at_random = case
    bits = seeds(made.name) if at_random else None
    whole, usual = through(made, values, bits), formats.PIECE
    formats.PIECE = piece
    try:
        assert same_bits(through(made, values, bits), whole)
    finally:
        formats.PIECE = usual
    for row in range(len(KEYS)):
        alone = through(made, values[row : row + 1], None if bits is None else bits[row : row + 1])
        assert same_bits(alone[1], whole[1][row : row + 1])


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["exp_avg", "second_moment"])
@pytest.mark.parametrize("top", [1.0, 1.985, 1.96, 1.993, 1.9999])
def test_random_rounding_has_the_right_mean(name: str, kind: str, top: float) -> None:
    values = torch.tensor([top, 0.337, -0.7001, 0.0123, -0.11, 0.4999])
    values = values.abs() if "second" in name else values
    made, count = form(name, (6,), kind), 4000
    salts = salts_of([f"w/{n}" for n in range(count)], CPU)
    rows = values.expand(count, -1).contiguous()
    stored = made.new(count, CPU)
    made.encode_(stored, rows, seeds_of(salts, name, 1))
    found = made.decode(stored).double()
    error = (found.mean(0) - values.double()).abs()
    assert (error <= 4.0 * found.std(0) / math.sqrt(count) + 1e-7).all()
    assert (found.std(0)[1:] > 0).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("name", ["exp_avg", "second_moment", "factor_0"])
@pytest.mark.parametrize("beta", [0.9, 0.99, 0.999])
def test_a_slow_average_passes_powers_of_two(name: str, kind: str, beta: float) -> None:
    """It starts at zero, and each element has a limit of its own; 1.98 to 1.999 are near the end of an octave."""
    d, count = 6, 32
    limits = torch.tensor([1.98, 1.9921, 1.9999, 2.04, 2.3, 3.1, 3.97, 1.0]).repeat(5)[: d * d].view(d, d)
    limits = limits.tril() + limits.tril(-1).mT
    made = form(name, (d, d), kind)
    stored, salts = made.new(count, CPU), salts_of([f"w/{n}" for n in range(count)], CPU)
    steps = min(600, round(5.0 / (1.0 - beta)))
    for step in range(1, steps + 1):
        average = made.decode(stored).lerp(limits, 1.0 - beta)
        made.encode_(stored, average, seeds_of(salts, name, step))
    found, wanted = made.decode(stored), limits * (1.0 - beta**steps)
    error = (found.mean(0) - wanted).abs()
    assert (error <= 4.5 * found.std(0) / math.sqrt(count) + 0.01 * wanted).all()


def test_random_bits_are_those_of_python_in_every_lane_and_tail() -> None:
    generator = random.Random(0)
    for start, count in ((0, 1), (0, 7), (5, 33), (10**6, 100)):
        found = random_bits(seeds("exp_avg", 9), start, count)
        n = generator.randrange(count)
        for row, key in enumerate(KEYS):
            assert found[row, n].item() == narrow.random_bits(key, "exp_avg", 9, start + n)
        assert found.min() >= 0 and found.max() < 2**16


def test_no_block_has_the_random_bits_of_another_one_in_another_step() -> None:
    """Keys and steps that differ in digits at the same place, as they do."""
    salts = salts_of([f"layers.{n}.weight/{m}" for n in range(20) for m in range(10)], CPU)
    found = torch.cat([seeds_of(salts, name, step) for name in ("exp_avg", "factor_0") for step in range(1, 101)])
    assert len(found.unique()) >= len(found) - 2  # of 40,000 random numbers of 32 bits about 0.2 are equal


def test_random_bits_differ_between_blocks_tensors_steps_and_elements() -> None:
    streams = [
        random_bits(seeds(name, step), 0, 4096).flatten(1) for name in ("exp_avg", "factor_0") for step in (1, 2)
    ]
    rows = torch.cat(streams).double()
    assert ((rows.mean(1) / 2**16 - 0.5).abs() < 0.03).all()
    centred = rows - rows.mean(1, keepdim=True)
    correlation = torch.corrcoef(torch.cat([centred, centred.roll(1, 1)])) - torch.eye(2 * len(rows))
    assert correlation.abs().max() < 0.08


@pytest.mark.parametrize(("name", "kind"), [("factor_0", "packed"), ("root_0", "int8"), ("exp_avg", "int8")])
def test_temporaries_are_small(name: str, kind: str) -> None:
    """Of a tensor of 100 MiB at most 64 MiB are made at a time, apart from what is asked for."""
    d = 5120
    made = form(name, (d, d), kind)
    stored, values = made.new(1, CPU), torch.zeros(1, d, d)
    with Largest() as largest:
        made.encode_(stored, values, seeds(name)[:1])
    assert 2**20 < largest.nbytes <= 2**26


@given(cases(), st.integers(0, 2**32))
def test_any_bytes_are_read_as_finite_numbers(case: tuple[Form, Tensor, bool], seed: int) -> None:
    made = case[0]
    stored = made.new(2, CPU)
    generator = torch.Generator().manual_seed(seed)
    for tensor in stored.values():
        if tensor.dtype == torch.int8:
            tensor.copy_(torch.randint(-128, 128, tensor.shape, generator=generator))
    found = made.decode(stored)
    assert found.isfinite().all()
    assert not made.squares or (found >= 0).all()


@given(cases())
def test_stored_tensors_say_their_form(case: tuple[Form, Tensor, bool]) -> None:
    made = case[0]
    found = stored_forms(made.stored)
    assert list(found) == [made.name] and found[made.name].shape == made.shape
    assert found[made.name].stored == made.stored


@pytest.mark.parametrize(
    "stored",
    [
        {"factor_0_triangle": (F32, (5,))},
        {"factor_0_int8": (torch.int8, (6,)), "factor_0_diagonal": (F32, (3,))},
        {"root_0_int8": (torch.int8, (6,)), "root_0_exponent": (torch.int8, (2,)), "root_0_diagonal": (F32, (3,))},
        {"exp_avg_int8": (torch.int8, (4, 40)), "exp_avg_exponent": (torch.uint8, (5,))},
        {"exp_avg_int8": (torch.int8, (4, 8)), "exp_avg_exponent": (torch.int8, (1,)), "exp_avg": (F32, (4, 8))},
    ],
    ids=str,
)  # fmt: skip
def test_tensors_that_do_not_go_together_are_an_error(stored: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> None:
    with pytest.raises(ValueError, match="factor_0|root_0|exp_avg|triangle"):
        stored_forms(stored)


@given(numbers)
def test_one_number(value: float) -> None:
    for kind in ("bfloat16", "int8"):
        made = form("exp_avg", (1,), kind)
        _, found = through(made, torch.full((3, 1), value), seeds("exp_avg"))
        assert ((found - value).abs() <= max(abs(value) / 64.0, 2.0**-126)).all()
