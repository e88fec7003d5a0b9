"""Blocks: merging dims keeps matrices, and cutting tiles the shape."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shampoo_deepspeed.geometry.blocks import blocks_touching, cut_into_blocks, cut_lengths, merge_small_dims, sides_of
from shampoo_deepspeed.geometry.boxes import Box, tiling_error
from tests.support.strategies import shapes


@pytest.mark.parametrize(
    ("shape", "max_dim", "merged"),
    [
        ((32, 32), 1024, (32, 32)),  # small, but never merged into a vector
        ((64, 3, 3, 3), 1024, (64, 27)),
        ((512, 512, 3, 3), 1024, (512, 512, 9)),
        ((2, 3, 4, 5), 60, (2, 60)),
        ((2, 3, 4, 5), 6, (6, 4, 5)),
        ((4, 1, 5), 8, (4, 5)),
        ((1, 7, 1), 8, (7,)),
        ((7,), 8, (7,)),
        ((1, 1), 8, ()),
        ((), 8, ()),
    ],
)
def test_merging(shape: tuple[int, ...], max_dim: int, merged: tuple[int, ...]) -> None:
    assert merge_small_dims(shape, max_dim)[0] == merged


@given(shapes, st.integers(1, 40))
def test_merging_keeps_all_elements_and_at_least_a_matrix(shape: tuple[int, ...], max_dim: int) -> None:
    merged, groups = merge_small_dims(shape, max_dim)
    real = [d for d, n in enumerate(shape) if n != 1]
    assert math.prod(merged) == math.prod(shape)
    assert [d for group in groups for d in group] == real
    assert [math.prod(shape[d] for d in group) for group in groups] == list(merged)
    assert len(merged) >= min(2, len(real))
    for group, size in zip(groups, merged, strict=True):
        assert len(group) == 1 or size <= max_dim


@given(shapes, st.integers(1, 12))
def test_blocks_tile_the_shape_and_respect_the_size(shape: tuple[int, ...], max_dim: int) -> None:
    boxes = cut_into_blocks(shape, max_dim)
    assert tiling_error(shape, boxes) is None
    assert all(n <= max_dim for box in boxes for n in box.lengths)
    assert boxes == sorted(boxes)


@given(st.data(), shapes, st.integers(1, 12))
def test_blocks_touching_a_box_are_those_that_intersect_it(
    data: st.DataObject, shape: tuple[int, ...], max_dim: int
) -> None:
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))
    expected = [i for i, block in enumerate(cut_into_blocks(shape, max_dim)) if block.intersect(box)]
    assert blocks_touching(shape, max_dim, box) == expected


def test_without_merging_only_dims_of_size_one_go() -> None:
    assert merge_small_dims((4, 1, 2, 3), 1024, merge=False) == ((4, 2, 3), ((0,), (2,), (3,)))


@pytest.mark.parametrize("experts", [1, 6])
def test_a_batch_dim_is_kept_and_never_merged(experts: int) -> None:
    assert merge_small_dims((experts, 2, 3, 1, 4), 12, batch_dims=1) == ((experts, 2, 12), ((0,), (1,), (2, 4)))


SIDES: list[tuple[tuple[int, ...], dict[str, Any], tuple[str, ...]]] = [
    ((4, 9), {}, ("matrix", "matrix")),
    ((4, 9), {"large_dim": "diagonal"}, ("matrix", "diagonal")),
    ((4, 9), {"large_dim": "identity"}, ("matrix", "none")),
    ((4, 9), {"one_sided": "left"}, ("matrix", "none")),
    ((4, 9), {"one_sided": "right"}, ("none", "matrix")),
    ((4, 9), {"one_sided": "smaller"}, ("matrix", "none")),
    ((9, 4), {"one_sided": "smaller"}, ("none", "matrix")),
    ((4, 4), {"one_sided": "smaller"}, ("matrix", "none")),
    ((4, 9), {"one_sided": "right", "large_dim": "diagonal"}, ("none", "diagonal")),
    ((3, 4, 9), {"batch_dims": 1, "one_sided": "smaller"}, ("none", "matrix", "none")),
    ((9, 4, 7), {"batch_dims": 1}, ("none", "matrix", "matrix")),
]


@pytest.mark.parametrize(("shape", "options", "expected"), SIDES)
def test_what_each_dim_has(shape: tuple[int, ...], options: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert sides_of(shape, 8, **options) == expected


side_options = st.fixed_dictionaries(
    {
        "large_dim": st.sampled_from(["block", "diagonal", "identity"]),
        "one_sided": st.sampled_from([None, "left", "right", "smaller"]),
        "batch_dims": st.integers(0, 1),
    }
)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=4).map(tuple), st.integers(1, 12), side_options)
def test_blocks_have_the_sides_of_their_parameter(shape: tuple[int, ...], max_dim: int, options: Any) -> None:
    """The mathematics sees only blocks, and must decide for them as the geometry did for the parameter."""
    sides = sides_of(shape, max_dim, **options)
    boxes = cut_into_blocks(shape, cut_lengths(shape, max_dim, sides, options["batch_dims"]))
    assert tiling_error(shape, boxes) is None
    for box in boxes:
        assert sides_of(box.lengths, max_dim, **options) == sides
        assert all(n <= max_dim for n, side in zip(box.lengths, sides, strict=True) if side == "matrix")
        assert not options["batch_dims"] or box.lengths[0] == 1


def test_a_fused_matrix_is_split_before_it_is_cut() -> None:
    assert cut_lengths((16, 7), 5, ("matrix", "matrix"), split=(8, 4, 4)) == ((5, 3, 4, 4), (5, 2))
    assert cut_lengths((7, 16), 99, ("matrix", "matrix"), split=(8, 4, 4)) == ((7,), (8, 4, 4))
    assert cut_lengths((16, 16), 99, ("matrix", "none"), split=(8, 8)) == ((8, 8), (16,))
    assert cut_lengths((3, 6, 3), 99, ("none", "matrix", "matrix"), 1, (2, 1)) == ((1, 1, 1), (6,), (2, 1))
    with pytest.raises(ValueError, match=r"split = \[8, 4\] adds up to 12, and no dim of \(16, 7\) is that long"):
        cut_lengths((16, 7), 5, ("matrix", "matrix"), split=(8, 4))


@given(st.data(), shapes)
def test_blocks_of_uneven_lengths_that_touch_a_box_are_those_that_intersect_it(
    data: st.DataObject, shape: tuple[int, ...]
) -> None:
    cuts = []
    for n in shape:
        inner = data.draw(st.sets(st.integers(1, max(1, n - 1)), max_size=3)) - {n}
        ends = [0, *sorted(inner), n]
        cuts.append(tuple(b - a for a, b in zip(ends, ends[1:], strict=False)))
    offsets = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    box = Box(offsets, tuple(data.draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))
    blocks = cut_into_blocks(shape, tuple(cuts))
    assert tiling_error(shape, blocks) is None
    assert blocks_touching(shape, tuple(cuts), box) == [i for i, block in enumerate(blocks) if block.intersect(box)]
