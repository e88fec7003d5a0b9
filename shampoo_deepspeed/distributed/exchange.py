"""Executes a plan: packs pieces of gradients, moves them to the owners in buckets, and updates back.

Everything that moves is described once, at the first step, as addresses in flat buffers; a step only makes views,
packs them in one call, and runs `all_to_all_single` with uneven splits on the group that spans the shards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.geometry.boxes import Placed, row_major
from shampoo_deepspeed.geometry.plan import Piece, Plan, Transfers
from shampoo_deepspeed.runtime.devices import communication_device
from shampoo_deepspeed.runtime.metrics import ExchangeMeter

Pieces: TypeAlias = dict[int, list[Piece]]


class Address(NamedTuple):
    """A strided region of one flat base tensor."""

    base: int
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


Resolver: TypeAlias = Callable[[Piece], Address]


def views(bases: Sequence[Tensor], addresses: Sequence[Address]) -> list[Tensor]:
    """Views of the addressed regions."""
    starts = [b.storage_offset() for b in bases]
    return [bases[a.base].as_strided(a.size, a.stride, starts[a.base] + a.offset) for a in addresses]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)


def _cut(buffer: Tensor, addresses: Sequence[Address]) -> list[Tensor]:
    """A contiguous buffer cut into consecutive pieces of the addresses' sizes."""
    if not addresses:
        return []
    parts = torch.split(buffer, [math.prod(a.size) for a in addresses])
    return [p.view(a.size) for p, a in zip(parts, addresses, strict=True)]


@dataclass
class Route:
    """One direction of one bucket: addresses in send order and receive order, and elements per peer."""

    send: list[Address] = field(default_factory=list)
    receive: list[Address] = field(default_factory=list)
    send_splits: list[int] = field(default_factory=list)
    receive_splits: list[int] = field(default_factory=list)


@dataclass
class Bucket:
    """Rows of this rank's stacks that travel together, and their routes.

    ``rows`` are (stack, first row, last row + 1); base i of every block address is the tensor of ``rows[i]``.
    """

    rows: list[tuple[int, int, int]]
    moves: bool
    local_shards: list[Address]
    local_blocks: list[Address]
    gradients: Route
    updates: Route


@dataclass
class CommStats:
    """Bytes that this rank sent to and received from other ranks in the last step, and by how many collectives."""

    bytes_sent: int = 0
    bytes_received: int = 0
    collectives: int = 0


class Exchange:
    """The buckets of one rank, resolved to memory.

    Args:
        plan: the unit's plan.
        rank: this rank's number within the group.
        shards: this rank's shards as (base tensor index, place), in the order given to the plan.
        group: process group that spans the shards; None where there is one rank only.
        dtype: what travels.
        device: where the base tensors and the stacks lie, also where this rank has none.
    """

    def __init__(
        self,
        plan: Plan,
        rank: int,
        shards: Sequence[tuple[int, Placed]],
        group: dist.ProcessGroup | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.plan, self.rank, self.group, self.dtype, self.device = plan, rank, group, dtype, device
        self._shards = shards
        self._place_of_block: dict[int, tuple[int, int]] = {}
        self.stacks: list[list[int]] = []
        self._lay_out_stacks()
        self.buckets = [self._resolve(n, t) for n, t in enumerate(plan.transfers(rank))]
        self.waits = False  # for each collective where it is started, to debug
        self.stats = CommStats()
        self.meter = ExchangeMeter()

    def _lay_out_stacks(self) -> None:
        keys: dict[tuple[int, tuple[int, ...]], int] = {}
        for block in self.plan.owned[self.rank]:
            key = self.plan.blocks[block].stack
            if key not in keys:
                keys[key] = len(self.stacks)
                self.stacks.append([])
            stack = self.stacks[keys[key]]
            self._place_of_block[block] = (keys[key], len(stack))
            stack.append(block)

    def _resolve(self, number: int, t: Transfers) -> Bucket:
        rows: list[tuple[int, int, int]] = []
        for stack, blocks in enumerate(self.stacks):
            inside = [row for row, block in enumerate(blocks) if self.plan.buckets[block] == number]
            if inside:
                rows.append((stack, inside[0], inside[-1] + 1))
        base_of = {stack: (base, first) for base, (stack, first, _) in enumerate(rows)}

        def at_block(piece: Piece) -> Address:
            block = self.plan.blocks[piece.block].box
            stack, row = self._place_of_block[piece.block]
            base, first = base_of[stack]
            placed = Placed(block, (row - first) * block.numel, row_major(block.lengths)).part(piece.box)
            return Address(base, placed.offset, piece.box.lengths, placed.strides)

        def at_shard(piece: Piece) -> Address:
            base, place = self._shards[piece.shard]
            part = place.part(piece.box)
            return Address(base, part.offset, piece.box.lengths, part.strides)

        def route(out: Pieces, sender: Resolver, into: Pieces, receiver: Resolver) -> Route:
            made = Route()
            for peer in range(self.plan.world_size):
                leaving, coming = out.get(peer, []), into.get(peer, [])
                made.send += [sender(p) for p in leaving]
                made.receive += [receiver(p) for p in coming]
                made.send_splits.append(sum(p.box.numel for p in leaving))
                made.receive_splits.append(sum(p.box.numel for p in coming))
            return made

        return Bucket(
            rows=rows,
            moves=self.plan.moving[number],
            local_shards=[at_shard(p) for p in t.local],
            local_blocks=[at_block(p) for p in t.local],
            gradients=route(t.gradients_out, at_shard, t.gradients_in, at_block),
            updates=route(t.updates_out, at_block, t.updates_in, at_shard),
        )

    def begin_step(self, waits: bool) -> None:
        """Count a step.

        Args:
            waits: for each collective as soon as it is started, to debug.
        """
        self.stats = CommStats()
        self.meter.steps += 1
        self.waits = waits

    def send_gradients(self, bucket: Bucket, shard_gradients: Sequence[Tensor]) -> Transit:
        """Start moving a bucket's gradient pieces from the shards to their owners."""
        with self._measured(bucket):
            return self._start(bucket, bucket.gradients, shard_gradients)

    def receive_gradients(
        self, bucket: Bucket, transit: Transit, shard_gradients: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> None:
        """Fill the block gradients (one tensor [rows, *block shape] per entry of ``bucket.rows``)."""
        _copy(views(gradients, bucket.local_blocks), self._rounded(views(shard_gradients, bucket.local_shards)))
        with self._measured(bucket):
            self._finish(transit, bucket.gradients, gradients)

    def send_updates(self, bucket: Bucket, updates: Sequence[Tensor], shard_updates: Sequence[Tensor]) -> Transit:
        """Start moving updates from the owners to all holders; what stays here is copied at once."""
        _copy(views(shard_updates, bucket.local_shards), self._rounded(views(updates, bucket.local_blocks)))
        with self._measured(bucket):
            return self._start(bucket, bucket.updates, updates)

    def receive_updates(self, bucket: Bucket, transit: Transit, shard_updates: Sequence[Tensor]) -> None:
        """Fill this rank's parts of the updates."""
        with self._measured(bucket):
            self._finish(transit, bucket.updates, shard_updates)

    def _measured(self, bucket: Bucket) -> AbstractContextManager[None]:
        return self.meter.watch.span(self.device) if bucket.moves else nullcontext()

    def _start(self, bucket: Bucket, route: Route, bases: Sequence[Tensor]) -> Transit:
        if not bucket.moves:
            return Transit(None, None, None)
        packed = torch.empty(sum(route.send_splits), dtype=self.dtype, device=self.device)
        _copy(_cut(packed, route.send), views(bases, route.send))
        wire = communication_device(self.group, self.device)
        outgoing = packed.to(wire)
        incoming = torch.empty(sum(route.receive_splits), dtype=self.dtype, device=wire)
        work = dist.all_to_all_single(
            incoming, outgoing, route.receive_splits, route.send_splits, group=self.group, async_op=True
        )
        if self.waits:
            work.wait()
        self.stats.bytes_sent += outgoing.nbytes
        self.stats.bytes_received += incoming.nbytes
        self.stats.collectives += 1
        self.meter.bytes_moved += outgoing.nbytes + incoming.nbytes
        return Transit(work, outgoing, incoming)

    def _finish(self, transit: Transit, route: Route, bases: Sequence[Tensor]) -> None:
        if transit.work is None or transit.incoming is None:
            return
        transit.work.wait()
        _copy(views(bases, route.receive), _cut(transit.incoming.to(self.device), route.receive))

    def _rounded(self, pieces: list[Tensor]) -> list[Tensor]:
        """Pieces that stay are rounded like those that travel: else replicas and owners would drift apart."""
        if self.plan.world_size == 1:
            return pieces
        return [p.to(self.dtype) if p.dtype.itemsize > self.dtype.itemsize else p for p in pieces]


class Transit(NamedTuple):
    """A bucket under way: the collective's handle and the buffers that it still uses."""

    work: dist.Work | None
    outgoing: Tensor | None
    incoming: Tensor | None
