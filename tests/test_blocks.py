"""Blocks: merging keeps matrices, cutting tiles the shape."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shampoo_deepspeed.blocks import blocks_touching, cut_into_blocks, merge_small_dims
from shampoo_deepspeed.boxes import Box, tiling_error
from tests.strategies import shapes


@pytest.mark.parametrize(
    ("shape", "max_dim", "merged"),
    [
        ((32, 32), 1024, (32, 32)),  # never a vector, small as it is
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
