"""Assigns each block one owner: balances the work of every step, and prefers ranks that already hold the block's data.

Pure integers and floats, no tensors; all ranks compute the same owners.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from shampoo_deepspeed.geometry.holders import BlockHolders

LOCALITY_TOLERANCE = 0.04


class Work(Protocol):
    """What a block costs: FLOPs per step with the refresh's share, FLOPs of a refresh, and its refresh phase."""

    @property
    def cost(self) -> float: ...

    @property
    def refresh(self) -> float: ...

    @property
    def phase(self) -> int | None: ...


def assign(
    blocks: Sequence[Work], holders: Sequence[BlockHolders], world_size: int, prior_loads: Sequence[float]
) -> tuple[list[int], list[float]]:
    """Owners of the blocks, and each rank's load (FLOPs per step).

    The largest block comes first. Each goes to the rank that holds most of it while that keeps balance, else to the
    least loaded rank: longest-processing-time scheduling with a preference for locality. No rank's load exceeds the
    larger of (1 + tolerance) times the mean and the mean plus one block. If refreshes are staggered, this holds in
    each phase (by refresh cost; the total load breaks ties), because a step takes as long as its slowest rank.

    Args:
        holders: who holds each block.
        prior_loads: loads of earlier units, which break ties between ranks in this one.
    """
    ledger = _Ledger(world_size, prior_loads)
    owners = [0] * len(blocks)
    so_far: list[float] = []
    for phase, members in sorted(_by_phase(blocks).items()):
        so_far += [blocks[b].cost for b in members]
        refreshes = [blocks[b].refresh for b in members] if phase >= 0 else None
        ledger.open_phase(_limit(so_far, world_size), _limit(refreshes, world_size) if refreshes else None)
        for number in sorted(members, key=lambda b: (-blocks[b].cost, b)):
            owner = ledger.local(holders[number], blocks[number])
            if owner is None:
                owner = ledger.least_of_all()
            ledger.add(owner, blocks[number])
            owners[number] = owner
    return owners, ledger.loads


def _by_phase(blocks: Sequence[Work]) -> dict[int, list[int]]:
    """Numbers of the blocks by phase; -1 for those that refresh together."""
    phases: dict[int, list[int]] = {}
    for number, block in enumerate(blocks):
        phases.setdefault(-1 if block.phase is None else block.phase, []).append(number)
    return phases


def best_possible(costs: Sequence[float], world_size: int) -> float:
    """A lower bound of the slowest rank's load, however blocks are assigned.

    The load is at least the mean. Of the k * ranks + 1 largest blocks some rank has k + 1, so its load is at least
    k + 1 times the smallest of them.
    """
    falling = sorted(costs, reverse=True)
    whole_blocks = (share * cost for share, cost in enumerate(falling[::world_size], 1))
    return max([sum(costs) / world_size, *whole_blocks], default=0.0)


def _limit(costs: Sequence[float], world_size: int) -> float:
    """The load up to which a rank may get blocks because it holds their data."""
    return max((1.0 + LOCALITY_TOLERANCE) * sum(costs) / world_size, best_possible(costs, world_size))


class _Ledger:
    """Loads of the ranks while owners are chosen."""

    def __init__(self, world_size: int, prior_loads: Sequence[float]) -> None:
        self.loads = [0.0] * world_size
        self._carried = prior_loads
        self._everyone = range(world_size)

    def open_phase(self, limit: float, phase_limit: float | None) -> None:
        """Begin the next phase; up to these limits, in total and in this phase, blocks may stay local."""
        self._limit, self._phase_limit = limit, phase_limit
        self._phase_loads = [0.0] * len(self.loads)
        self._queues: dict[int, _Queue] = {}  # by the id of the ranks, as a hash of a thousand would take long

    def add(self, rank: int, block: Work) -> None:
        self.loads[rank] += block.cost
        if self._phase_limit is not None:
            self._phase_loads[rank] += block.refresh

    def least(self, ranks: Sequence[int]) -> int:
        """The least loaded of these ranks, which must be the same object each time."""
        if len(ranks) == 1:
            return ranks[0]
        if id(ranks) not in self._queues:
            self._queues[id(ranks)] = _Queue(ranks, self._key)
        return self._queues[id(ranks)].least()

    def least_of_all(self) -> int:
        """The least loaded rank."""
        return self.least(self._everyone)

    def local(self, holders: BlockHolders, block: Work) -> int | None:
        """The least loaded rank with room for the block among those that hold most of it, or None."""
        best = None
        for elements, ranks in holders.candidates:
            if elements == holders.box.numel and len(ranks) == len(self.loads):
                return None  # replicated on all ranks: locality does not matter
            if best is not None and elements < best[0]:
                break
            rank = self.least(ranks)
            fits = self.loads[rank] + block.cost <= self._limit
            if self._phase_limit is not None:
                fits = fits and self._phase_loads[rank] + block.refresh <= self._phase_limit
            if fits and (best is None or self._key(rank) < best[1]):
                best = elements, self._key(rank), rank
        return None if best is None else best[2]

    def _key(self, rank: int) -> tuple[float, float, float, int]:
        return self._phase_loads[rank], self.loads[rank], self._carried[rank], rank


class _Queue:
    """Finds the rank with the smallest key; keys only grow."""

    def __init__(self, ranks: Iterable[int], key: Callable[[int], tuple[float, float, float, int]]) -> None:
        self._key = key
        self._heap = [key(rank) for rank in ranks]
        heapq.heapify(self._heap)

    def least(self) -> int:
        while True:
            rank = self._heap[0][3]
            current = self._key(rank)
            if current == self._heap[0]:
                return rank
            heapq.heapreplace(self._heap, current)
