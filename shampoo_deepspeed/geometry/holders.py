"""Which ranks hold which boxes of a matrix's blocks. Pure integers, no tensors.

Layers of one shape are usually sharded alike, so this is computed once for each shape and sharding. A rank needs the
boxes of those blocks only that it owns. For the others it needs the few ranks that hold much of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import accumulate

from shampoo_deepspeed.geometry.blocks import Cuts, blocks_touching, cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.geometry.shards import HeldBox, Sharding

# A rank that holds less than one part in this many of a block is no better an owner than any other.
SHARE_THAT_COUNTS = 8


class BlockHolders:
    """The ranks that hold one block, or parts of it.

    Args:
        box: the block.
        parts: the boxes that its parameter is divided into.
        candidates: (elements, ranks) of the ranks that hold enough of it to save traffic as its owner; most first.
    """

    def __init__(self, box: Box, parts: _Parts, candidates: Sequence[tuple[int, tuple[int, ...]]]) -> None:
        self.box = box
        self.candidates = candidates
        self._parts = parts

    @cached_property
    def held_boxes(self) -> list[HeldBox]:
        """The boxes that the block is divided into, in order, each with its ranks."""
        found = ((self.box.intersect(box), ranks) for box, ranks in self._parts.near(self.box))
        return sorted(HeldBox(common, ranks) for common, ranks in found if common is not None)

    def held_by(self, rank: int) -> int:
        """The number of the block's elements on a rank."""
        return sum(box.numel for box, ranks in self.held_boxes if holds(ranks, rank))

    @cached_property
    def copies(self) -> int:
        """The number of elements on all ranks together; more than the block has if there are replicas."""
        return sum(box.numel * len(ranks) for box, ranks in self.held_boxes)

    def lies_only_on(self, rank: int) -> bool:
        """Whether this rank, and no other, holds all of the block."""
        return bool(self.candidates) and self.candidates[0] == (self.box.numel, (rank,))


def holds(ranks: Sequence[int], rank: int) -> bool:
    """Whether a rank is one of these, which are in ascending order."""
    place = bisect_left(ranks, rank)
    return place < len(ranks) and ranks[place] == rank


class _Parts:
    """The boxes of a sharding, to be found by the block that they share elements with."""

    def __init__(self, sharding: Sharding) -> None:
        self._parts = sharding.parts
        # Boxes are ordered by where they begin in the first dim. The furthest end so far only grows, too.
        self._begins = [box.offsets[0] for box, _ in self._parts]
        self._furthest = list(accumulate((box.ends[0] for box, _ in self._parts), max))

    def near(self, block: Box) -> Iterable[HeldBox]:
        """The boxes that may share elements with a block."""
        first = bisect_right(self._furthest, block.offsets[0])
        return self._parts[first : bisect_left(self._begins, block.ends[0])]


def holders_of_blocks(shape: Sequence[int], cuts: Cuts, sharding: Sharding) -> list[BlockHolders]:
    """The holders of each block of a matrix, in the order of ``cut_into_blocks``."""
    blocks = cut_into_blocks(shape, cuts)
    elements = _elements_of_candidates(shape, cuts, blocks, sharding)
    parts = _Parts(sharding)
    found = []
    for number, box in enumerate(blocks):
        enough = [(n, ranks) for ranks, n in elements[number].items() if n * SHARE_THAT_COUNTS >= box.numel]
        found.append(BlockHolders(box, parts, sorted(enough, key=lambda item: (-item[0], item[1]))))
    return found


def _elements_of_candidates(
    shape: Sequence[int], cuts: Cuts, blocks: Sequence[Box], sharding: Sharding
) -> Mapping[int, Mapping[tuple[int, ...], int]]:
    """The elements of each block on ranks that may hold enough of one; replicas count once, together."""
    together: dict[tuple[int, ...], list[Box]] = defaultdict(list)
    for box, ranks in sharding.parts:
        together[ranks].append(box)
    smallest = min((block.numel for block in blocks), default=0)
    elements: dict[int, dict[tuple[int, ...], int]] = defaultdict(lambda: defaultdict(int))
    for ranks, boxes in together.items():
        if sum(box.numel for box in boxes) * SHARE_THAT_COUNTS < smallest:
            continue  # with a thousand ranks, this is true of all
        for box in boxes:
            for index in blocks_touching(shape, cuts, box):
                common = blocks[index].intersect(box)
                if common is not None:
                    elements[index][ranks] += common.numel
    return elements


def holders_of_matrices(
    matrices: Sequence[tuple[tuple[int, ...], Cuts]], shardings: Sequence[Sharding]
) -> list[list[BlockHolders]]:
    """``holders_of_blocks`` of each matrix; matrices that are sharded alike share the same objects.

    Args:
        matrices: (shape, cuts) of each; cuts must be hashable.
        shardings: that of each; equal ones should be the same object.
    """
    known: dict[tuple[tuple[int, ...], Cuts, int], list[BlockHolders]] = {}
    found = []
    for (shape, cuts), sharding in zip(matrices, shardings, strict=True):
        key = (shape, cuts, id(sharding))
        if key not in known:
            known[key] = holders_of_blocks(shape, cuts, sharding)
        found.append(known[key])
    return found
