"""The three kinds of ranges: boxes of a tensor's shape, flat ranges, and boxes that are placed in flat memory.

Pure integers, no tensors. Every sharding that frameworks use is a set of boxes. FSDP2 gives one per parameter;
a flat range (ZeRO, FSDP1) consists of at most 2k-1 boxes of an order-k tensor.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar


@dataclass(frozen=True, order=True, slots=True)
class Box:
    """An n-dimensional range: offsets and lengths along each dim, in elements."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.lengths)

    @property
    def ends(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offsets, self.lengths, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common box, or None if the two share no element."""
        low = tuple(map(max, self.offsets, other.offsets))
        lengths = tuple(end - start for start, end in zip(low, map(min, self.ends, other.ends), strict=True))
        return Box(low, lengths) if all(n > 0 for n in lengths) else None

    def within(self, outer: Box) -> tuple[int, ...]:
        """This box's offsets relative to the corner of ``outer``."""
        return tuple(o - corner for o, corner in zip(self.offsets, outer.offsets, strict=True))


class FlatRange(NamedTuple):
    """Consecutive elements from ``start`` up to but not including ``stop``, counted in one dim.

    They are elements of a flattened tensor, rows of a stack, positions in one dim of a tensor, or bytes.
    ``slice(*elements)`` selects them.
    """

    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start

    def intersect(self, other: FlatRange) -> FlatRange | None:
        """The common elements, or None if there are none."""
        start, stop = max(self.start, other.start), min(self.stop, other.stop)
        return FlatRange(start, stop) if start < stop else None

    def shift(self, by: int) -> FlatRange:
        """A range of the same size that starts ``by`` elements later."""
        return FlatRange(self.start + by, self.stop + by)


@dataclass(frozen=True, slots=True)
class PlacedBox:
    """A box and its place in a flat buffer: element i is at ``offset + sum(i * strides)``."""

    box: Box
    offset: int
    strides: tuple[int, ...]

    @classmethod
    def contiguous(cls, box: Box, offset: int) -> PlacedBox:
        """A box whose elements are contiguous (row-major) from ``offset`` on."""
        return cls(box, offset, row_major(box.lengths))

    def part(self, box: Box) -> PlacedBox:
        """The place of a box inside this one."""
        start = self.offset + sum(i * s for i, s in zip(box.within(self.box), self.strides, strict=True))
        return PlacedBox(box, start, self.strides)


# The number of a flat base tensor, and a box in it.
BaseBox: TypeAlias = tuple[int, PlacedBox]
Content = TypeVar("Content")
# Gets boxes of this rank's flat tensors, and the content of each.
Take: TypeAlias = Callable[[Sequence[BaseBox], Sequence[Content]], None]


def whole(shape: Sequence[int]) -> Box:
    """The box of a whole tensor."""
    return Box((0,) * len(shape), tuple(shape))


def chunk(length: int, parts: int, index: int) -> FlatRange:
    """The part that ``torch.chunk`` gives a rank: equal parts, the last ones shorter or empty."""
    size = -(-length // parts)
    start = min(index * size, length)
    return FlatRange(start, min(start + size, length))


def row_major(lengths: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor of this shape."""
    strides = [1] * len(lengths)
    for dim in range(len(lengths) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * lengths[dim + 1]
    return tuple(strides)


def range_to_boxes(shape: Sequence[int], elements: FlatRange) -> list[Box]:
    """The boxes, in memory order, of a flat range of a contiguous tensor.

    Each box is itself contiguous in memory. There are at most 2k-1 of them for an order-k tensor.
    """
    start, stop = elements
    if start >= stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = math.prod(shape[1:])
    first, last = start // inner, (stop - 1) // inner
    if len(shape) == 1 or (start % inner == 0 and stop % inner == 0):
        return [Box((first, *(0,) * (len(shape) - 1)), (last - first + 1, *shape[1:]))]
    if first == last:
        return _in_row(shape, first, FlatRange(start - first * inner, stop - first * inner))
    boxes: list[Box] = []
    head = start % inner
    if head:
        boxes += _in_row(shape, first, FlatRange(head, inner))
        first += 1
    tail = stop % inner
    rows = (last + 1 if not tail else last) - first
    if rows > 0:
        boxes.append(Box((first, *(0,) * (len(shape) - 1)), (rows, *shape[1:])))
    if tail:
        boxes += _in_row(shape, last, FlatRange(0, tail))
    return boxes


def _in_row(shape: Sequence[int], row: int, elements: FlatRange) -> list[Box]:
    return [Box((row, *b.offsets), (1, *b.lengths)) for b in range_to_boxes(shape[1:], elements)]


def merged_places(box: Box, shape: Sequence[int], groups: Sequence[Sequence[int]], offset: int = 0) -> list[PlacedBox]:
    """A box of ``shape``, held contiguously at ``offset``, as placed boxes of the merged shape.

    Args:
        groups: for each merged dim the original dims that it joins, in order; dims of size 1 may be left out.
    """
    strides = row_major(box.lengths)
    per_group = [list(_along_merged_dim(box, shape, strides, dims)) for dims in groups]
    places = []
    for along in itertools.product(*per_group):
        merged = Box(tuple(p.box.offsets[0] for p in along), tuple(p.box.lengths[0] for p in along))
        places.append(PlacedBox(merged, offset + sum(p.offset for p in along), tuple(p.strides[0] for p in along)))
    return places


def _along_merged_dim(
    box: Box, shape: Sequence[int], strides: Sequence[int], dims: Sequence[int]
) -> Iterator[PlacedBox]:
    """The parts of one merged dim that a box with these strides covers, as placed boxes of that dim alone."""
    cut = len(dims) - 1
    while cut > 0 and box.lengths[dims[cut]] == shape[dims[cut]]:
        cut -= 1
    inner = math.prod(shape[d] for d in dims[cut + 1 :])
    weights = row_major([shape[d] for d in dims])
    length = box.lengths[dims[cut]] * inner
    for index in itertools.product(*(range(box.lengths[d]) for d in dims[:cut])):
        start = box.offsets[dims[cut]] * weights[cut]
        start += sum((box.offsets[d] + i) * w for d, i, w in zip(dims[:cut], index, weights, strict=False))
        offset = sum(i * strides[d] for d, i in zip(dims[:cut], index, strict=True))
        yield PlacedBox(Box((start,), (length,)), offset, (strides[dims[-1]],))


def tiling_error(shape: Sequence[int], boxes: Iterable[Box]) -> str | None:
    """None if the boxes cover every element of ``shape`` exactly once, else a description of what is wrong."""
    ordered = sorted(boxes)
    for box in ordered:
        if any(o < 0 or end > n for o, end, n in zip(box.offsets, box.ends, shape, strict=True)):
            return f"{box} lies outside of shape {tuple(shape)}"
    # Sweep along a dim in which boxes differ. Along one that all of them cover, each would be compared with all others.
    differ = (dim for dim in range(len(shape)) if len({(b.offsets[dim], b.lengths[dim]) for b in ordered}) > 1)
    along = next(differ, 0)
    ordered.sort(key=lambda b: b.offsets[along : along + 1])
    active: list[Box] = []
    for box in ordered:
        active = [b for b in active if not b.offsets or b.ends[along] > box.offsets[along]]
        for other in active:
            if box.intersect(other) is not None:
                return f"{box} and {other} overlap"
        active.append(box)
    covered, total = sum(b.numel for b in ordered), math.prod(shape)
    return None if covered == total else f"{covered} of {total} elements are covered"
