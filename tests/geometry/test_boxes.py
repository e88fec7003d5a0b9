"""Boxes: any cut of any shape tiles it exactly, and every box has the right offset in memory."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo_deepspeed.geometry.blocks import merge_small_dims
from shampoo_deepspeed.geometry.boxes import Box, FlatRange, chunk, merged_places, range_to_boxes, tiling_error, whole
from tests.support.strategies import shapes


@given(st.data(), shapes)
def test_a_flat_range_is_at_most_2k_minus_1_boxes_in_memory_order(data: st.DataObject, shape: tuple[int, ...]) -> None:
    numel = math.prod(shape)
    start = data.draw(st.integers(0, numel))
    stop = data.draw(st.integers(start, numel))
    boxes = range_to_boxes(shape, FlatRange(start, stop))
    assert len(boxes) <= 2 * len(shape) - 1
    tensor = torch.arange(numel).view(shape)
    elements = [tensor[tuple(map(slice, b.offsets, b.ends))].reshape(-1) for b in boxes]
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.long), *elements]), torch.arange(start, stop))


@given(st.data(), shapes, st.integers(1, 6))
def test_any_cut_of_the_flat_tensor_tiles_it(data: st.DataObject, shape: tuple[int, ...], ranks: int) -> None:
    from tests.support.strategies import flat_cuts

    cuts = data.draw(flat_cuts(math.prod(shape), ranks))
    boxes = [box for elements in cuts for box in range_to_boxes(shape, elements)]
    assert tiling_error(shape, boxes) is None
    if len(boxes) > 1:
        assert "elements are covered" in str(tiling_error(shape, boxes[1:]))
        assert "overlap" in str(tiling_error(shape, [*boxes, boxes[0]]))


def test_a_box_outside_of_the_shape_is_named() -> None:
    assert "outside" in str(tiling_error((4, 4), [Box((2, 0), (3, 4))]))


@st.composite
def boxes_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, n - 1)) for n in shape)
    return Box(offsets, tuple(draw(st.integers(1, n - o)) for n, o in zip(shape, offsets, strict=True)))


@given(st.data(), shapes, st.integers(1, 20))
def test_a_box_keeps_its_elements_when_small_dims_are_merged(
    data: st.DataObject, shape: tuple[int, ...], max_dim: int
) -> None:
    """A shard is a contiguous copy of a box; its placed boxes must contain the right elements of the merged tensor."""
    merged, groups = merge_small_dims(shape, max_dim)
    box = data.draw(boxes_of(shape))
    tensor = torch.arange(math.prod(shape))
    local = torch.cat([torch.tensor([-1]), tensor.view(shape)[tuple(map(slice, box.offsets, box.ends))].reshape(-1)])
    seen = []
    for place in merged_places(box, shape, groups, offset=1):
        held = local.as_strided(place.box.lengths, place.strides, place.offset)
        expected = tensor.view(merged)[tuple(map(slice, place.box.offsets, place.box.ends))]
        assert torch.equal(held, expected)
        seen.append(held.reshape(-1))
    assert torch.equal(torch.cat(seen).sort().values, local[1:].sort().values)


@given(st.data(), shapes)
def test_a_part_of_a_placed_box_is_where_the_whole_says(data: st.DataObject, shape: tuple[int, ...]) -> None:
    (place,) = merged_places(whole(shape), shape, [(d,) for d in range(len(shape))])
    box = data.draw(boxes_of(shape))
    tensor = torch.arange(math.prod(shape))
    part = place.part(box)
    expected = tensor.view(shape)[tuple(map(slice, box.offsets, box.ends))]
    assert torch.equal(tensor.as_strided(box.lengths, part.strides, part.offset), expected)


@pytest.mark.parametrize(
    ("a", "b", "common"),
    [
        (Box((0, 0), (4, 4)), Box((2, 1), (4, 2)), Box((2, 1), (2, 2))),
        (Box((0,), (3,)), Box((3,), (2,)), None),
        (Box((), ()), Box((), ()), Box((), ())),
    ],
)
def test_intersections(a: Box, b: Box, common: Box | None) -> None:
    assert a.intersect(b) == common == b.intersect(a)


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(-9, 9))
def test_flat_ranges_intersect_and_shift_as_python_ranges_do(a: int, b: int, c: int, d: int, by: int) -> None:
    one, other = FlatRange(min(a, b), max(a, b)), FlatRange(min(c, d), max(c, d))
    common = one.intersect(other)
    found = set(range(*common)) if common is not None else set()
    assert found == set(range(*one)) & set(range(*other))
    assert common is None or common.size == len(found) > 0
    assert one.shift(by) == (one.start + by, one.stop + by)
    assert list(range(20))[slice(*one)] == list(range(*one))


@given(st.integers(0, 30), st.integers(1, 8))
def test_chunks_are_those_of_torch(length: int, parts: int) -> None:
    found = [torch.arange(length)[slice(*chunk(length, parts, index))] for index in range(parts)]
    expected = torch.arange(length).chunk(parts)
    assert [t.tolist() for t in found if len(t)] == [t.tolist() for t in expected if len(t)]


@pytest.mark.parametrize("along", [0, 1, 2])
def test_a_thousand_parts_are_not_compared_with_one_another(along: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Along whichever dim a tensor is cut; FSDP2 may cut along any (``shard_placement_fn``)."""
    compared: list[Box] = []
    intersect = Box.intersect

    def counted(self: Box, other: Box) -> Box | None:
        compared.append(other)
        return intersect(self, other)

    monkeypatch.setattr(Box, "intersect", counted)
    shape, offsets = [2, 2, 2], [[0, 0, 0] for _ in range(1024)]
    shape[along] = 1024
    for part, offset in enumerate(offsets):
        offset[along] = part
    lengths = tuple(1 if dim == along else 2 for dim in range(3))
    boxes = [Box(tuple(offset), lengths) for offset in offsets]
    assert tiling_error(shape, boxes) is None and len(compared) <= 1024
    assert "overlap" in str(tiling_error(shape, [*boxes[:-1], boxes[0]]))
