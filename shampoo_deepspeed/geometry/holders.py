"""Which ranks hold which boxes of a matrix's blocks. Pure integers, no tensors.

Layers of one shape are usually sharded alike, so this is computed once for each shape and sharding. A plan for a
thousand ranks has millions of boxes but only a few distinct answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

from shampoo_deepspeed.geometry.blocks import Cuts, blocks_touching, cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box

# A rank that holds less than one part in this many of a block is no better an owner than any other.
SHARE_THAT_COUNTS = 8


class HeldBox(NamedTuple):
    """A box within a block and the ranks that hold it, more than one if there are replicas."""

    box: Box
    ranks: tuple[int, ...]


class BlockHolders:
    """The ranks that hold one block, or parts of it.

    Args:
        box: the block.
        held_boxes: the boxes that it is divided into, each with its ranks, in any order.
    """

    def __init__(self, box: Box, held_boxes: Sequence[HeldBox]) -> None:
        self.box = box
        self.held_boxes = sorted(held_boxes)
        self._ranks_by_box = dict(self.held_boxes)

    def ranks_of(self, box: Box) -> tuple[int, ...]:
        """The ranks that hold one of the boxes."""
        return self._ranks_by_box[box]

    @cached_property
    def held(self) -> dict[int, int]:
        """The number of the block's elements on each rank that holds any."""
        held: dict[int, int] = defaultdict(int)
        for box, ranks in self.held_boxes:
            numel = box.numel
            for rank in ranks:
                held[rank] += numel
        return dict(held)

    @cached_property
    def copies(self) -> int:
        """The number of elements on all ranks together; more than the block has if there are replicas."""
        return sum(self.held.values())

    @cached_property
    def candidates(self) -> list[tuple[int, tuple[int, ...]]]:
        """(elements, ranks) of the ranks that hold enough of the block to save traffic as its owner; most first."""
        elements: dict[tuple[int, ...], int] = defaultdict(int)
        for box, ranks in self.held_boxes:
            elements[ranks] += box.numel
        enough = [(n, ranks) for ranks, n in elements.items() if n * SHARE_THAT_COUNTS >= self.box.numel]
        return sorted(enough, key=lambda item: (-item[0], item[1]))

    def lies_only_on(self, rank: int) -> bool:
        """Whether this rank, and no other, holds all of the block."""
        return self.copies == self.box.numel == self.held.get(rank, 0)


def holders_of_blocks(shape: Sequence[int], cuts: Cuts, held: Sequence[tuple[int, Box]]) -> list[BlockHolders]:
    """The holders of each block of a matrix, in the order of ``cut_into_blocks``.

    Args:
        held: (rank, box) of every shard; equal boxes are replicas.
    """
    ranks: dict[Box, list[int]] = defaultdict(list)
    for rank, box in held:
        ranks[box].append(rank)
    blocks = cut_into_blocks(shape, cuts)
    held_boxes: list[list[HeldBox]] = [[] for _ in blocks]
    shared: dict[tuple[int, ...], tuple[int, ...]] = {}
    for shard, holding in ranks.items():
        together = tuple(dict.fromkeys(holding))
        together = shared.setdefault(together, together)
        for index in blocks_touching(shape, cuts, shard):
            common = blocks[index].intersect(shard)
            if common is not None:
                held_boxes[index].append(HeldBox(common, together))
    return [BlockHolders(box, found) for box, found in zip(blocks, held_boxes, strict=True)]


def holders_of_matrices(
    matrices: Sequence[tuple[tuple[int, ...], Cuts]], shards: Sequence[Sequence[tuple[int, Box]]]
) -> list[list[BlockHolders]]:
    """``holders_of_blocks`` of each matrix; matrices that are sharded alike share the same objects.

    Args:
        matrices: (shape, cuts) of each; cuts must be hashable.
        shards: for each rank the boxes it holds, as (index of the matrix, box in its shape).
    """
    by_matrix: list[list[tuple[int, Box]]] = [[] for _ in matrices]
    for rank, held in enumerate(shards):
        for number, box in held:
            by_matrix[number].append((rank, box))
    known: dict[tuple[tuple[int, ...], Cuts, tuple[tuple[int, Box], ...]], list[BlockHolders]] = {}
    found = []
    for (shape, cuts), held_here in zip(matrices, by_matrix, strict=True):
        key = (shape, cuts, tuple(held_here))
        if key not in known:
            known[key] = holders_of_blocks(shape, cuts, held_here)
        found.append(known[key])
    return found
