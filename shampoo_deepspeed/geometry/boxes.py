"""Boxes: axis-aligned pieces of a tensor's global shape, their intersections and their place in flat memory.

Pure integers, no tensors. Every sharding that frameworks use is a set of boxes: FSDP2 gives one per parameter,
a contiguous flat interval (ZeRO, FSDP1) is at most 2k-1 boxes of an order-k tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """Offsets and lengths along each dim, in elements."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offsets, self.lengths, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None where the two share no element."""
        low = tuple(map(max, self.offsets, other.offsets))
        lengths = tuple(end - start for start, end in zip(low, map(min, self.ends, other.ends), strict=True))
        return Box(low, lengths) if all(n > 0 for n in lengths) else None

    def within(self, outer: Box) -> tuple[int, ...]:
        """This box's offsets counted from the corner of ``outer``."""
        return tuple(o - corner for o, corner in zip(self.offsets, outer.offsets, strict=True))


@dataclass(frozen=True)
class Placed:
    """A box and where it lies in a flat buffer: element i is at ``offset + sum(i * strides)``."""

    box: Box
    offset: int
    strides: tuple[int, ...]

    def part(self, box: Box) -> Placed:
        """The place of a box inside this one."""
        start = self.offset + sum(i * s for i, s in zip(box.within(self.box), self.strides, strict=True))
        return Placed(box, start, self.strides)


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def chunk(length: int, parts: int, index: int) -> tuple[int, int]:
    """Start and length of the part that ``torch.chunk`` gives a rank: equal parts, the last ones shorter or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return start, min(size, length - start)


def row_major(lengths: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    strides = [1] * len(lengths)
    for dim in range(len(lengths) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * lengths[dim + 1]
    return tuple(strides)


def interval_to_boxes(shape: Sequence[int], start: int, stop: int) -> list[Box]:
    """The boxes, in memory order, of the flat interval [start, stop) of a contiguous tensor.

    Each box is itself contiguous in memory. There are at most 2k-1 of them for an order-k tensor.
    """
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if len(shape) == 1 or (start % inner == 0 and stop % inner == 0):
        return [Box((first, *(0,) * (len(shape) - 1)), (last - first + 1, *shape[1:]))]
    if first == last:
        return _in_row(shape, first, start - first * inner, stop - first * inner)
    boxes: list[Box] = []
    head = start % inner
    if head:
        boxes += _in_row(shape, first, head, inner)
        first += 1
    tail = stop % inner
    rows = (last + 1 if not tail else last) - first
    if rows > 0:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])))
    if tail:
        boxes += _in_row(shape, last, 0, tail)
    return boxes


def _in_row(shape: Sequence[int], row: int, start: int, stop: int) -> list[Box]:
    return [Box((row, *b.offsets), (1, *b.lengths)) for b in interval_to_boxes(shape[1:], start, stop)]


def merged_places(box: Box, shape: Sequence[int], groups: Sequence[Sequence[int]], offset: int = 0) -> list[Placed]:
    """A box of ``shape``, held contiguously at ``offset``, as placed boxes of the merged shape.

    Args:
        groups: for each merged dim the original dims that it joins, in order; dims of size 1 may be left out.
    """
    strides = row_major(box.lengths)
    per_group = [list(_runs(box, shape, strides, dims)) for dims in groups]
    places = []
    for runs in itertools.product(*per_group):
        merged = Box(tuple(r[0] for r in runs), tuple(r[1] for r in runs))
        places.append(Placed(merged, offset + sum(r[2] for r in runs), tuple(r[3] for r in runs)))
    return places


def _runs(
    box: Box, shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]
) -> Iterator[tuple[int, int, int, int]]:
    """(start, length, memory offset, stride) of each contiguous run of the box along one merged dim."""
    cut = len(dims) - 1
    while cut > 0 and box.lengths[dims[cut]] == shape[dims[cut]]:
        cut -= 1
    inner = math.prod(shape[d] for d in dims[cut + 1 :])
    weights = row_major([shape[d] for d in dims])
    length = box.lengths[dims[cut]] * inner
    for index in itertools.product(*(range(box.lengths[d]) for d in dims[:cut])):
        start = box.offsets[dims[cut]] * weights[cut]
        start += sum((box.offsets[d] + i) * w for d, i, w in zip(dims[:cut], index, weights, strict=False))
        yield start, length, sum(i * strides[d] for d, i in zip(dims[:cut], index, strict=True)), strides[dims[-1]]


def tiling_error(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """None if the boxes cover every element of ``shape`` exactly once, else a description of what is wrong."""
    ordered = sorted(boxes)
    for box in ordered:
        if any(o < 0 or end > n for o, end, n in zip(box.offsets, box.ends, shape, strict=True)):
            return f"{box} lies outside of shape {tuple(shape)}"
    active: list[Box] = []
    for box in ordered:
        active = [b for b in active if not b.offsets or b.ends[0] > box.offsets[0]]
        for other in active:
            if box.intersect(other) is not None:
                return f"{box} and {other} overlap"
        active.append(box)
    covered, total = sum(b.numel for b in ordered), math.prod(shape)
    return None if covered == total else f"{covered} of {total} elements are covered"
