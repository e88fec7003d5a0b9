"""What a rank works through to spread blocks' bytes over many ranks, as torch's checkpoint helpers need it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from shampoo_deepspeed.geometry.boxes import FlatRange
from shampoo_deepspeed.state import dtensor_blocks
from shampoo_deepspeed.state.dtensor_blocks import BlockBytes, bytes_here

BYTES, OF_EACH = 96, 4  # of a block; blocks of each rank


def block_bytes(ranks: int, monkeypatch: pytest.MonkeyPatch) -> BlockBytes:
    """One parameter, whose blocks ranks own in rotation."""
    blocks = [SimpleNamespace(parameter=0, stack=(0, (4, 6))) for _ in range(OF_EACH * ranks)]
    owners = [number % ranks for number in range(len(blocks))]
    unit: Any = SimpleNamespace(
        plan=SimpleNamespace(blocks=blocks, owners=owners),
        block_parameters=[0],
        parameters=[None],
        stacks=[],
        exchange=SimpleNamespace(stacks=[]),
        group=None,
        device=torch.device("cpu"),
    )
    monkeypatch.setattr(dtensor_blocks, "all_reduce_maxima", lambda mine, group, device: [BYTES] * len(mine))
    return BlockBytes(unit)


@pytest.mark.parametrize("ranks", [8, 64])
def test_what_a_rank_gets_from_others_is_found_by_looking_at_each_block_once(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = block_bytes(ranks, monkeypatch)
    total = blocks.total(0)
    mine = FlatRange(total // ranks, 2 * total // ranks)
    looked_at = []
    intersect = FlatRange.intersect
    monkeypatch.setattr(FlatRange, "intersect", lambda a, b: looked_at.append(a) or intersect(a, b))  # type: ignore[func-returns-value]
    found = [blocks._common(0, owner, mine) for owner in range(ranks)]
    assert len(looked_at) == OF_EACH * ranks
    assert sorted(common for of_owner in found for common in of_owner.values()) == [
        FlatRange(start, start + BYTES) for start in range(mine.start, mine.stop, BYTES)
    ]
    assert all(b % ranks == owner for owner, of_owner in enumerate(found) for b in of_owner)


@pytest.mark.parametrize("placements", [[Replicate(), Shard(0)], [Shard(0), Shard(0)]], ids=str)
def test_the_ranges_of_all_ranks_are_those_that_each_rank_has(
    placements: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found without asking them, and for each mesh once."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranges = []
    for rank in range(6):
        torch.distributed.init_process_group("fake", rank=rank, world_size=6, store=FakeStore())
        try:
            mesh = DeviceMesh("cpu", torch.tensor([[5, 3, 1], [0, 2, 4]]))
            blocks = block_bytes(6, monkeypatch)
            blocks.unit.group = torch.distributed.group.WORLD
            total = blocks.total(0)
            like = DTensor.from_local(torch.empty(4, 2), mesh, placements, run_check=False)
            held = blocks._held_by_ranks(like, total)
            flat = torch.empty(held[rank].size, dtype=torch.uint8)
            stored = DTensor.from_local(
                flat, mesh, [Shard(0), Shard(0)], run_check=False, shape=torch.Size([total]), stride=(1,)
            )
            assert bytes_here(stored) == held[rank]
            ranges.append(held)
            assert blocks._held_by_ranks(like, total) == held and len(blocks._places) == 1
        finally:
            torch.distributed.destroy_process_group()
    assert all(held == ranges[0] for held in ranges)
    assert sorted(ranges[0])[0].start == 0 and sum(held.size for held in ranges[0]) == BYTES * OF_EACH * 6
