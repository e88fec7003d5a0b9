"""Who owns which block, and what travels between ranks each step. Pure integers, no tensors.

The plan of a step unit is a pure function of the parameters' shapes, the options and the shards of all ranks. So
every rank computes the same one. That takes O(blocks * log(ranks)) for the owners, and O(ranks) for each different
sharding. Transfers are computed for one rank at a time: all ranks together have millions.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from shampoo_deepspeed.geometry.blocks import Cuts, Side, blocks_touching
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.geometry.holders import BlockHolders, holders_of_matrices, holds
from shampoo_deepspeed.geometry.owners import assign, best_possible
from shampoo_deepspeed.geometry.shards import Held, Sharding, Shards

# FLOPs of a batched eigendecomposition and of computing the root from it, in units of d^3.
REFRESH_CUBES = 25.0

# With n equal buckets all of the exchange except one n-th each way can be hidden. On a CPU a bucket stays in the cache
# while it is processed. More than eight hid no more. Buckets of less than half a million elements cost more in
# calls than they hide; above four million a link gains nothing and memory is wasted (benchmarks.slow_link). Where
# nothing moves there is nothing to hide, and a bucket of half that is less memory in a step.
BUCKETS, FEWEST_IN_BUCKET, MOST_IN_BUCKET = 8, 1 << 19, 1 << 22
MOST_THAT_STAYS = 1 << 21
# An accelerator has no such cache, and each bucket costs the CPU a millisecond of launches. So memory bounds its
# buckets: 128 MiB of float32 if anything moves, as there are eight in flight, else 1 GiB.
MOST_ON_ACCELERATORS, MOST_THAT_STAYS_ON_ACCELERATORS = 1 << 25, 1 << 28
# Relative sizes of the first buckets, and in reverse of the last ones. They apply if there are at least this many
# buckets and no block is larger than the smallest of them.
TAPER, FEWEST_TAPERED = (0.25, 0.5), 4


@dataclass(frozen=True)
class Matrix:
    """A preconditioned parameter: its merged shape, how it is cut into blocks, stack key (group) and refresh frequency.

    ``phases`` holds each block's refresh phase, or is None if all refresh together. ``sides`` is what each dim has;
    None means a factor matrix for all. ``products`` is the number of products of a factor's size for each dim and
    step. ``decompositions`` is the time of a refresh relative to a decomposition in float32.
    ``orthogonalisations`` is the number of iterations that orthogonalise each block in a step; batch dims are not part
    of a block's matrix then.
    """

    shape: tuple[int, ...]
    cuts: Cuts
    group: int
    frequency: int
    phases: tuple[int, ...] | None = None
    sides: tuple[Side, ...] | None = None
    products: float = 2.0
    decompositions: float = 1.0
    orthogonalisations: int = 0
    batch_dims: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """One block: its parameter (index into the matrices), its index there, its box, and its group.

    ``step`` is the FLOPs of a step without refresh, ``refresh`` those of a refresh, and ``cost`` those of a step with
    the refresh's share. ``phase`` is the block's refresh phase.
    """

    parameter: int
    index: int
    box: Box
    group: int
    cost: float
    step: float
    refresh: float
    phase: int | None

    @property
    def stack(self) -> tuple[int, tuple[int, ...]]:
        """The key of the block's stack: blocks of one rank with the same key are computed together."""
        return self.group, self.box.lengths


@dataclass(frozen=True, slots=True)
class Transfer:
    """A box of a block that moves between ranks: the block, the box, and (at the holder) the shard that contains it."""

    block: int
    box: Box
    shard: int


@dataclass
class Transfers:
    """One rank's share of a bucket. Lists per peer are in the same order on both sides."""

    local: list[Transfer] = field(default_factory=list)
    gradients_out: dict[int, list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    gradients_in: dict[int, list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    updates_out: dict[int, list[Transfer]] = field(default_factory=lambda: defaultdict(list))
    updates_in: dict[int, list[Transfer]] = field(default_factory=lambda: defaultdict(list))


def step_cost(lengths: Sequence[int], sides: Sequence[Side] | None = None, products: float = 2.0) -> float:
    """FLOPs of a block in a step without refresh: ``products`` products of the factor's size for each dim.

    A dim with a diagonal costs four operations for each element, and a dim with nothing costs nothing. The
    element-wise part of a step counts too, so that no block is free.
    """
    numel = math.prod(lengths)
    total = 4.0 * numel
    for n, side in zip(lengths, sides or ["matrix"] * len(lengths), strict=True):
        total += {"matrix": 2.0 * products * n * numel, "diagonal": 4.0 * numel, "none": 0.0}[side]
    return total


def iteration_cost(lengths: Sequence[int]) -> float:
    """FLOPs of one Newton-Schulz iteration of a block, as the matrix of its first dim and all others."""
    numel = math.prod(lengths)
    short, long = sorted((lengths[0], numel // lengths[0]))
    return 2.0 * (2.0 * short * short * long + short**3)


def refresh_cost(lengths: Sequence[int], sides: Sequence[Side] | None = None) -> float:
    """FLOPs of a block's refresh."""
    matrices = [n for n, side in zip(lengths, sides or ["matrix"] * len(lengths), strict=True) if side == "matrix"]
    return sum(REFRESH_CUBES * n**3 for n in matrices)


def bucket_elements(megabytes: float | None, itemsize: int) -> int | None:
    """The number of elements in a bucket of this size; None lets the plan choose."""
    return None if megabytes is None else max(1, int(megabytes * 2**20 / itemsize))


def tapered_ends(count: int) -> list[float]:
    """The ends of ``count`` + 3 buckets as shares of an owner's blocks; no bucket is larger than 1 / ``count``.

    Nothing can hide the gradients of the first bucket and the updates of the last one, so these are small. Their
    neighbours are half as large as the others, so that each bucket arrives while the one before it is computed.
    """
    sizes = [*TAPER, *[1.0] * (count - 1), *reversed(TAPER)]
    whole = sum(sizes)
    return [part / whole for part in itertools.accumulate(sizes)]


class Plan:
    """Owners, buckets and transfers of one step unit.

    Args:
        matrices: the preconditioned parameters, the same list on all ranks.
        shards: which boxes of the matrices' merged shapes each rank holds, or for each rank a list of them, as (index
            of the matrix, box). Together they must cover every matrix exactly once; replicas of one box count once.
        bucket_elements: maximum number of elements of an owner's blocks in a bucket; a larger block gets a bucket of
            its own. None: one of ``BUCKETS`` equal parts of what the fullest rank owns, within bounds.
        prior_loads: loads of earlier units, which break ties between ranks in this one.
        on_accelerators: whether blocks are computed on accelerators, which allows larger buckets.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        shards: Shards | Sequence[Sequence[Held]],
        bucket_elements: int | None = 1 << 62,
        prior_loads: Sequence[float] | None = None,
        on_accelerators: bool = False,
    ) -> None:
        self.matrices = tuple(matrices)
        self.shards = shards if isinstance(shards, Shards) else Shards.of_ranks(shards, len(self.matrices))
        self.world_size = self.shards.world_size
        self.blocks: list[Block] = []
        self._holders: list[BlockHolders] = []
        self._first: list[int] = []
        shardings = self.shards.shardings
        self._list_blocks(holders_of_matrices([(m.shape, m.cuts) for m in self.matrices], shardings))
        prior_loads = prior_loads or [0.0] * self.world_size
        self.owners, self.loads = assign(self.blocks, self._holders, self.world_size, prior_loads)
        self.owned = self._owned_in_stack_order()
        self._moved: dict[int, tuple[int, int]] = {}
        self.buckets = self._bucket_blocks(bucket_elements, on_accelerators)
        self.bucket_count = max(self.buckets, default=-1) + 1
        self.gradients_move, self.updates_move = self._moves(self.buckets)

    def _moves(self, buckets: Sequence[int]) -> tuple[list[bool], list[bool]]:
        """Whether any gradient, and any update, of a bucket moves between ranks; replicas move updates only."""
        count = max(buckets, default=-1) + 1
        gradients, updates = [False] * count, [False] * count
        for holders, owner, bucket in zip(self._holders, self.owners, buckets, strict=True):
            if not updates[bucket] and not holders.lies_only_on(owner):
                updates[bucket] = True
            if not gradients[bucket] and holders.held_by(owner) < holders.box.numel:
                gradients[bucket] = True
        return gradients, updates

    def collectives(self, bucket_elements: int | None, on_accelerators: bool) -> tuple[int, int]:
        """(buckets, collectives) of a step if blocks were computed on CPUs or on accelerators."""
        buckets = self._bucket_blocks(bucket_elements, on_accelerators)
        return max(buckets, default=-1) + 1, sum(map(sum, self._moves(buckets)))

    def _list_blocks(self, holders: Sequence[Sequence[BlockHolders]]) -> None:
        for number, (matrix, found) in enumerate(zip(self.matrices, holders, strict=True)):
            phases = matrix.phases or [None] * len(found)
            if len(phases) != len(found):
                raise ValueError(f"matrix {number} {matrix.shape} has {len(found)} blocks but {len(phases)} phases")
            self._first.append(len(self.blocks))
            self._holders += found
            shapes = {held.box.lengths for held in found}
            costs = {
                shape: (
                    step_cost(shape, matrix.sides, matrix.products)
                    + matrix.orthogonalisations * iteration_cost(shape[matrix.batch_dims :]),
                    matrix.decompositions * refresh_cost(shape, matrix.sides),
                )
                for shape in shapes
            }
            for index, (held, phase) in enumerate(zip(found, phases, strict=True)):
                step, refresh = costs[held.box.lengths]
                cost = step + refresh / matrix.frequency
                self.blocks.append(Block(number, index, held.box, matrix.group, cost, step, refresh, phase))

    def _owned_in_stack_order(self) -> list[list[int]]:
        """Each rank's blocks, by stack and within a stack by phase, so that a staggered refresh works on a slice."""
        owned: list[list[int]] = [[] for _ in range(self.world_size)]
        keys = [(block.stack, -1 if block.phase is None else block.phase) for block in self.blocks]
        for block in sorted(range(len(self.blocks)), key=keys.__getitem__):
            owned[self.owners[block]].append(block)
        return owned

    def _bucket_blocks(self, bucket_elements: int | None, on_accelerators: bool) -> list[int]:
        """The bucket of each block, in the order of each owner's stacks, so that a bucket is a slice of each stack.

        If the first and last buckets are small, all owners have the same share of their blocks in a bucket.
        Otherwise each owner fills one bucket after another.
        """
        totals = [sum(self.blocks[block].box.numel for block in owned) for owned in self.owned]
        if bucket_elements is None:
            stays = self._moves_nothing()
            if on_accelerators:
                most = MOST_THAT_STAYS_ON_ACCELERATORS if stays else MOST_ON_ACCELERATORS
            else:
                most = MOST_THAT_STAYS if stays else MOST_IN_BUCKET
            hides = not (on_accelerators and stays)  # else one bucket is best, as nothing is under way
            bucket_elements = min(max(max(totals) // BUCKETS, FEWEST_IN_BUCKET), most) if hides else most
        largest = max((block.box.numel for block in self.blocks), default=0)
        count = -(-max(totals) // bucket_elements)
        tapers = self.world_size > 1 and count >= FEWEST_TAPERED and largest <= TAPER[0] * bucket_elements
        ends = tapered_ends(count) if tapers else []
        buckets = [0] * len(self.blocks)
        for owned, total in zip(self.owned, totals, strict=True):
            bucket = filled = done = 0
            for block in owned:
                numel = self.blocks[block].box.numel
                due = bisect_right(ends, (done + numel / 2) / total)
                if filled and filled + numel > bucket_elements:
                    due = max(due, bucket + 1)
                if due > bucket:
                    bucket, filled = due, 0
                buckets[block] = bucket
                filled += numel
                done += numel
        return buckets

    def _moves_nothing(self) -> bool:
        return all(found.lies_only_on(owner) for found, owner in zip(self._holders, self.owners, strict=True))

    def transfers(self, rank: int) -> list[Transfers]:
        """What this rank sends, receives and keeps, bucket by bucket.

        A box's gradients come from the block's owner if it holds the box, else from another holder. Updates go to every
        holder.
        """
        out = [Transfers() for _ in range(self.bucket_count)]
        for transfer, ranks in self._held_here(rank):
            block = transfer.block
            owner, bucket = self.owners[block], out[self.buckets[block]]
            if owner == rank:
                bucket.local.append(transfer)
                continue
            bucket.updates_in[owner].append(transfer)
            if self._source(block, ranks) == rank:
                bucket.gradients_out[owner].append(transfer)
        for block in sorted(self.owned[rank]):
            bucket = out[self.buckets[block]]
            for box, ranks in self._holders[block].held_boxes:
                transfer = Transfer(block, box, -1)
                for holder in ranks:
                    if holder != rank:
                        bucket.updates_out[holder].append(transfer)
                source = self._source(block, ranks)
                if source != rank:
                    bucket.gradients_in[source].append(transfer)
        return out

    def _held_here(self, rank: int) -> Iterator[tuple[Transfer, tuple[int, ...]]]:
        """The boxes of blocks that a rank holds, by block and box, each with all ranks that hold it."""
        held = []
        for shard, (number, box) in enumerate(self.shards.of_rank(rank)):
            matrix, first = self.matrices[number], self._first[number]
            ranks = self.shards.shardings[number].ranks_of(box)
            for index in blocks_touching(matrix.shape, matrix.cuts, box):
                common = self.blocks[first + index].box.intersect(box)
                if common is not None:
                    held.append((first + index, common, shard, ranks))
        return ((Transfer(block, box, shard), ranks) for block, box, shard, ranks in sorted(held))

    def _source(self, block: int, ranks: tuple[int, ...]) -> int:
        """The rank whose copy of a box's gradient goes to the owner."""
        owner = self.owners[block]
        return owner if holds(ranks, owner) else ranks[block % len(ranks)]

    @cached_property
    def traffic(self) -> list[tuple[int, int]]:
        """Elements that each rank (sends, receives) per step, gradients and updates together.

        These are computed as sums, without listing transfers. A rank receives updates for all that it holds except
        what it owns itself. If no other rank has a copy, it sends the gradients of just these elements.
        """
        sent, received = [0] * self.world_size, [0] * self.world_size
        copied: dict[Sharding, bool] = {}
        for sharding, count in Counter(self.shards.shardings).items():
            copied[sharding] = any(len(ranks) > 1 for _, ranks in sharding.parts)
            for box, ranks in sharding.parts:
                for rank in ranks:
                    received[rank] += count * box.numel
                    sent[rank] += 0 if copied[sharding] else count * box.numel
        for number, (holders, owner) in enumerate(zip(self._holders, self.owners, strict=True)):
            own = holders.held_by(owner)
            received[owner] += holders.box.numel - 2 * own
            sent[owner] += holders.copies - own
            if not copied[self.shards.shardings[self.blocks[number].parameter]]:
                sent[owner] -= own
                continue
            for box, ranks in holders.held_boxes:
                source = self._source(number, ranks)
                if source != owner:
                    sent[source] += box.numel
        return list(zip(sent, received, strict=True))

    def elements_moved(self, rank: int) -> tuple[int, int]:
        """Elements that this rank (sends, receives) per step, gradients and updates together."""
        if rank not in self._moved:
            sent = received = 0
            for transfer, ranks in self._held_here(rank):
                if self.owners[transfer.block] != rank:
                    received += transfer.box.numel
                    sent += transfer.box.numel if self._source(transfer.block, ranks) == rank else 0
            for holders in (self._holders[block] for block in self.owned[rank]):
                own = holders.held_by(rank)
                sent += holders.copies - own
                received += holders.box.numel - own
            self._moved[rank] = sent, received
        return self._moved[rank]

    @property
    def imbalance(self) -> float:
        """The slowest rank's load divided by the best possible one; 1.0 is perfect."""
        best = best_possible([b.cost for b in self.blocks], self.world_size)
        return max(self.loads) / best if best else 1.0

    def loads_at(self, offset: int) -> list[float]:
        """Each rank's FLOPs in the step that comes ``offset`` steps after the first preconditioned one."""
        loads = list(self.step_loads)
        for (frequency, phase), refreshes in self._refresh_loads.items():
            if offset % frequency == phase:
                loads = [a + b for a, b in zip(loads, refreshes, strict=True)]
        return loads

    @cached_property
    def step_loads(self) -> list[float]:
        """Each rank's FLOPs in a step without refresh."""
        loads = [0.0] * self.world_size
        for block, owner in zip(self.blocks, self.owners, strict=True):
            loads[owner] += block.step
        return loads

    @cached_property
    def _refresh_loads(self) -> dict[tuple[int, int], list[float]]:
        """Each rank's FLOPs of refreshes by (frequency, phase)."""
        loads: dict[tuple[int, int], list[float]] = defaultdict(lambda: [0.0] * self.world_size)
        for block, owner in zip(self.blocks, self.owners, strict=True):
            loads[self.matrices[block.parameter].frequency, block.phase or 0][owner] += block.refresh
        return dict(loads)
