"""Who owns which block, and what travels between ranks each step. Pure integers, no tensors.

The plan of a step unit is a pure function of the parameters' shapes, the options and the shards of all ranks, so
every rank computes the same one.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from shampoo_deepspeed.blocks import Cuts, Side, blocks_touching, cut_into_blocks
from shampoo_deepspeed.boxes import Box

# A batched eigendecomposition with the rebuild of the root costs about as many FLOPs as this many d^3.
REFRESH_CUBES = 25.0
LOCALITY_TOLERANCE = 0.1


@dataclass(frozen=True)
class Matrix:
    """A preconditioned parameter: its merged shape, how it is cut into blocks, stack key (group), refresh frequency,
    and what each dim has where that is not a factor matrix for all."""

    shape: tuple[int, ...]
    cuts: Cuts
    group: int
    frequency: int
    sides: tuple[Side, ...] | None = None


@dataclass(frozen=True)
class Block:
    """One block: its parameter (index into the matrices), its index there, its box, and its group."""

    parameter: int
    index: int
    box: Box
    group: int
    cost: float

    @property
    def stack(self) -> tuple[int, tuple[int, ...]]:
        """Blocks of one rank with this same key are computed as one stack."""
        return self.group, self.box.lengths


@dataclass(frozen=True)
class Piece:
    """A part of a block on its way: the block, the part's box, and (at the holder) which shard it lies in."""

    block: int
    box: Box
    shard: int


@dataclass
class Transfers:
    """One rank's share of a bucket. Lists per peer are in the same order on both sides."""

    local: list[Piece] = field(default_factory=list)
    gradients_out: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    gradients_in: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    directions_out: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))
    directions_in: dict[int, list[Piece]] = field(default_factory=lambda: defaultdict(list))


def block_cost(lengths: Sequence[int], frequency: int, sides: Sequence[Side] | None = None) -> float:
    """FLOPs of a block per step: two products with its factors' size for each dim, and the refresh's share.

    A dim with a diagonal costs four operations for each element and one with nothing costs nothing. The element-wise
    part of a step counts too, so that no block is free.
    """
    numel = math.prod(lengths)
    total = 4.0 * numel
    for n, side in zip(lengths, sides or ["matrix"] * len(lengths), strict=True):
        if side == "matrix":
            total += 4.0 * n * numel + REFRESH_CUBES * n**3 / frequency
        elif side == "diagonal":
            total += 4.0 * numel
    return total


class Plan:
    """Owners, buckets and transfers of one step unit.

    Args:
        matrices: the preconditioned parameters, the same list on all ranks.
        shards: for each rank the boxes it holds, as (index of the matrix, box in its merged shape).
            Together they must cover every matrix exactly once; replicas of one box count once.
        bucket_elements: a bucket is closed when an owner's blocks in it reach this many elements.
        carried: loads of earlier units, which decide between ranks that are equal in this one.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        shards: Sequence[Sequence[tuple[int, Box]]],
        bucket_elements: int = 1 << 62,
        carried: Sequence[float] | None = None,
    ) -> None:
        self.world_size = len(shards)
        self._carried = list(carried or [0.0] * self.world_size)
        self.matrices = tuple(matrices)
        self.blocks: list[Block] = []
        self._first: list[int] = []
        for number, matrix in enumerate(matrices):
            self._first.append(len(self.blocks))
            for index, box in enumerate(cut_into_blocks(matrix.shape, matrix.cuts)):
                cost = block_cost(box.lengths, matrix.frequency, matrix.sides)
                self.blocks.append(Block(number, index, box, matrix.group, cost))
        self._holders = self._holders_by_box(shards)
        self._pieces = self._cut_pieces()
        self.owners, self.loads = self._assign()
        self.owned = self._owned_in_stack_order()
        self.buckets = self._bucket_blocks(bucket_elements)
        self.bucket_count = max(self.buckets, default=-1) + 1
        self.moving = [False] * self.bucket_count
        for block, pieces in enumerate(self._pieces):
            if any(rank != self.owners[block] for _, holders in pieces for rank, _ in holders):
                self.moving[self.buckets[block]] = True

    def _holders_by_box(self, shards: Sequence[Sequence[tuple[int, Box]]]) -> list[dict[Box, list[tuple[int, int]]]]:
        holders: list[dict[Box, list[tuple[int, int]]]] = [{} for _ in self.matrices]
        for rank, held in enumerate(shards):
            for shard, (number, box) in enumerate(held):
                holders[number].setdefault(box, []).append((rank, shard))
        return holders

    def _cut_pieces(self) -> list[list[tuple[Box, list[tuple[int, int]]]]]:
        """For each block its pieces in a fixed order, each with the (rank, shard) pairs that hold it."""
        pieces: list[list[tuple[Box, list[tuple[int, int]]]]] = [[] for _ in self.blocks]
        for number, by_box in enumerate(self._holders):
            matrix, first = self.matrices[number], self._first[number]
            for shard_box in sorted(by_box):
                for index in blocks_touching(matrix.shape, matrix.cuts, shard_box):
                    common = self.blocks[first + index].box.intersect(shard_box)
                    if common is not None:
                        pieces[first + index].append((common, by_box[shard_box]))
        return pieces

    def _assign(self) -> tuple[list[int], list[float]]:
        """Largest block first: to the rank that holds most of it while that keeps balance, else to the least loaded.

        Longest-processing-time scheduling with a preference for locality: no rank exceeds the larger of
        (1 + tolerance) times the best possible bound and the mean load plus one block.
        """
        total = sum(b.cost for b in self.blocks)
        best = max([total / self.world_size, *(b.cost for b in self.blocks)], default=0.0)
        limit = (1.0 + LOCALITY_TOLERANCE) * best
        loads = [0.0] * self.world_size
        owners = [0] * len(self.blocks)
        heap = [(0.0, self._carried[rank], rank) for rank in range(self.world_size)]
        heapq.heapify(heap)
        for block in sorted(range(len(self.blocks)), key=lambda b: (-self.blocks[b].cost, b)):
            cost = self.blocks[block].cost
            owner = self._local_candidate(block, loads, limit - cost)
            if owner is None:
                while heap[0][0] != loads[heap[0][2]]:
                    heapq.heapreplace(heap, (loads[heap[0][2]], *heap[0][1:]))
                owner = heap[0][2]
            loads[owner] += cost
            owners[block] = owner
        return owners, loads

    def _local_candidate(self, block: int, loads: Sequence[float], room: float) -> int | None:
        pieces = self._pieces[block]
        if len(pieces) == 1 and len(pieces[0][1]) == self.world_size:
            return None  # replicated on all ranks: locality says nothing
        held: dict[int, int] = defaultdict(int)
        for box, holders in pieces:
            for rank, _ in holders:
                held[rank] += box.numel
        fitting = [(-n, loads[rank], self._carried[rank], rank) for rank, n in held.items() if loads[rank] <= room]
        return min(fitting)[3] if fitting else None

    def _owned_in_stack_order(self) -> list[list[int]]:
        owned: list[list[int]] = [[] for _ in range(self.world_size)]
        for block in sorted(range(len(self.blocks)), key=lambda b: (self.blocks[b].stack, b)):
            owned[self.owners[block]].append(block)
        return owned

    def _bucket_blocks(self, bucket_elements: int) -> list[int]:
        """Bucket of each block: along each owner's stacks, so that a bucket is a slice of each stack."""
        buckets = [0] * len(self.blocks)
        for owned in self.owned:
            bucket = filled = 0
            for block in owned:
                if filled and filled + self.blocks[block].box.numel > bucket_elements:
                    bucket, filled = bucket + 1, 0
                buckets[block] = bucket
                filled += self.blocks[block].box.numel
        return buckets

    def transfers(self, rank: int) -> list[Transfers]:
        """What this rank sends, receives and keeps, bucket by bucket.

        Gradients of a piece come from its owner if that holds it, else from one of its holders; directions go to
        every holder.
        """
        out = [Transfers() for _ in range(self.bucket_count)]
        for block, pieces in enumerate(self._pieces):
            owner, bucket = self.owners[block], out[self.buckets[block]]
            for box, holders in pieces:
                by_rank = dict(holders)
                source = owner if owner in by_rank else holders[block % len(holders)][0]
                if owner == rank:
                    self._add_owned(bucket, block, box, by_rank, source)
                elif rank in by_rank:
                    piece = Piece(block, box, by_rank[rank])
                    bucket.directions_in[owner].append(piece)
                    if source == rank:
                        bucket.gradients_out[owner].append(piece)
        return out

    def _add_owned(self, bucket: Transfers, block: int, box: Box, by_rank: dict[int, int], source: int) -> None:
        owner = self.owners[block]
        for holder, shard in by_rank.items():
            if holder == owner:
                bucket.local.append(Piece(block, box, shard))
            else:
                bucket.directions_out[holder].append(Piece(block, box, -1))
        if source != owner:
            bucket.gradients_in[source].append(Piece(block, box, -1))

    def elements_moved(self, rank: int) -> tuple[int, int]:
        """Elements that this rank (sends, receives) per step, gradients and directions together."""
        sent = received = 0
        for t in self.transfers(rank):
            for pieces in (*t.gradients_out.values(), *t.directions_out.values()):
                sent += sum(p.box.numel for p in pieces)
            for pieces in (*t.gradients_in.values(), *t.directions_in.values()):
                received += sum(p.box.numel for p in pieces)
        return sent, received

    @property
    def imbalance(self) -> float:
        """Slowest rank's load over the best possible bound, 1.0 is perfect."""
        total = sum(b.cost for b in self.blocks)
        best = max([total / self.world_size, *(b.cost for b in self.blocks)], default=0.0)
        return max(self.loads) / best if best else 1.0
