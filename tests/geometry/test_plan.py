"""Plans: each gradient element reaches its owner once, each holder gets its update, ranks agree, loads balance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_deepspeed.engine.refresh_schedule import staggered_phases
from shampoo_deepspeed.geometry.blocks import Side, cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box, tiling_error, whole
from shampoo_deepspeed.geometry.owners import LOCALITY_TOLERANCE
from shampoo_deepspeed.geometry.plan import (
    FEWEST_IN_BUCKET,
    MOST_IN_BUCKET,
    MOST_THAT_STAYS,
    MOST_THAT_STAYS_ON_ACCELERATORS,
    Matrix,
    Plan,
    Transfer,
    Transfers,
    refresh_cost,
    step_cost,
    tapered_ends,
)
from tests.support import plan_oracle
from tests.support.strategies import sharded


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, list[list[tuple[int, Box]]]]:
    ranks, replicas = draw(st.integers(1, 5)), draw(st.integers(1, 2))
    shapes, shards = draw(sharded(ranks, replicas))
    max_dim, groups = draw(st.integers(2, 8)), draw(st.integers(1, 2))
    matrices = [Matrix(shape, max_dim, n % groups, 10) for n, shape in enumerate(shapes)]
    if draw(st.booleans()):
        matrices = staggered(matrices, draw(st.integers(1, 12)))
    return Plan(matrices, shards, draw(st.integers(1, 200))), shards


def staggered(matrices: list[Matrix], frequency: int) -> list[Matrix]:
    """Return the same matrices with their blocks' refreshes spread over the window."""
    cut = [cut_into_blocks(m.shape, m.cuts) for m in matrices]
    phases = iter(staggered_phases([refresh_cost(box.lengths) for boxes in cut for box in boxes], frequency))
    return [
        replace(m, frequency=frequency, phases=tuple(next(phases) for _ in boxes))
        for m, boxes in zip(matrices, cut, strict=True)
    ]


def moved(plan: Plan, transfers: list[list[Transfers]], kind: str) -> Iterable[tuple[int, int, int, list[Transfer]]]:
    for rank in range(plan.world_size):
        for number, bucket in enumerate(transfers[rank]):
            for peer, travelling in getattr(bucket, kind).items():
                yield rank, peer, number, travelling


@settings(max_examples=100)
@given(plans())
def test_what_is_sent_is_what_is_received(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, _ = made
    transfers = [plan.transfers(rank) for rank in range(plan.world_size)]
    for out, into in (("gradients_out", "gradients_in"), ("updates_out", "updates_in")):
        sent = {(r, p, b): [(x.block, x.box) for x in found] for r, p, b, found in moved(plan, transfers, out)}
        got = {(p, r, b): [(x.block, x.box) for x in found] for r, p, b, found in moved(plan, transfers, into)}
        assert sent == got
    totals = [plan.elements_moved(rank) for rank in range(plan.world_size)]
    assert sum(s for s, _ in totals) == sum(r for _, r in totals)


@settings(max_examples=150)
@given(plans())
def test_what_one_rank_works_out_is_what_a_search_over_all_ranks_finds(
    made: tuple[Plan, list[list[tuple[int, Box]]]],
) -> None:
    """Owners, transfers in their order, and bytes are compared."""
    plan, shards = made
    assert plan.owners == plan_oracle.owners(plan, shards, [0.0] * plan.world_size)
    for rank, expected in enumerate(plan_oracle.transfers(plan, shards)):
        assert plan.transfers(rank) == expected
        assert plan.elements_moved(rank) == plan.traffic[rank] == plan_oracle.elements(expected)


@settings(max_examples=100)
@given(plans())
def test_every_block_gets_each_gradient_element_once(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, _ = made
    arrived: dict[int, list[Box]] = {b: [] for b in range(len(plan.blocks))}
    for rank in range(plan.world_size):
        for bucket in plan.transfers(rank):
            for transfer in [*bucket.local, *(p for ps in bucket.gradients_in.values() for p in ps)]:
                assert plan.owners[transfer.block] == rank
                corner = plan.blocks[transfer.block].box
                arrived[transfer.block].append(Box(transfer.box.within(corner), transfer.box.lengths))
    for block, boxes in arrived.items():
        assert tiling_error(plan.blocks[block].box.lengths, boxes) is None


@settings(max_examples=100)
@given(plans())
def test_every_shard_element_gets_its_update_once(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, shards = made
    for rank, held in enumerate(shards):
        covered: dict[int, list[Box]] = {n: [] for n in range(len(held))}
        for bucket in plan.transfers(rank):
            for transfer in [*bucket.local, *(p for ps in bucket.updates_in.values() for p in ps)]:
                corner = held[transfer.shard][1]
                covered[transfer.shard].append(Box(transfer.box.within(corner), transfer.box.lengths))
        for shard, boxes in covered.items():
            assert tiling_error(held[shard][1].lengths, boxes) is None


@given(plans())
def test_all_ranks_compute_the_same_plan(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, shards = made
    again = Plan(plan.matrices, [list(s) for s in shards], 1 << 62)
    assert (again.owners, again.loads, again.blocks) == (plan.owners, plan.loads, plan.blocks)


@settings(max_examples=100)
@given(plans())
def test_blocks_that_lie_whole_with_their_owner_move_nothing(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, shards = made
    for kind, moving in (("gradients_out", plan.gradients_move), ("updates_out", plan.updates_move)):
        for number, moves in enumerate(moving):
            travelling = [
                found
                for rank in range(plan.world_size)
                for found in getattr(plan.transfers(rank)[number], kind).values()
            ]
            assert moves == any(travelling)
        if plan.world_size == 1:
            assert not any(moving)


@settings(max_examples=100)
@given(plans())
def test_buckets_are_slices_of_stacks_and_phases_are_too(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, _ = made
    for owned in plan.owned:
        keys = [(plan.blocks[b].stack, plan.blocks[b].phase or 0, b) for b in owned]
        assert keys == sorted(keys)
        buckets = [plan.buckets[b] for b in owned]
        assert buckets == sorted(buckets)
    assert sorted(b for owned in plan.owned for b in owned) == list(range(len(plan.blocks)))


@settings(max_examples=100)
@given(plans())
def test_the_slowest_rank_is_within_the_bound(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    """The bound is 4 % above the mean or, if single blocks are too large for that, the mean plus one block.

    If refreshes are staggered, it also holds for the refresh work of every step.
    """
    plan, _ = made
    costs = [b.cost for b in plan.blocks]
    assert sum(plan.loads) == pytest.approx(sum(costs))
    if plan.blocks[0].phase is None:
        within_the_bound(plan.loads, costs)
        return
    for phase in {b.phase for b in plan.blocks}:
        members = [n for n, b in enumerate(plan.blocks) if b.phase == phase]
        loads = [0.0] * plan.world_size
        for n in members:
            loads[plan.owners[n]] += plan.blocks[n].refresh
        within_the_bound(loads, [plan.blocks[n].refresh for n in members])


def within_the_bound(loads: list[float], costs: list[float]) -> None:
    mean = sum(costs) / len(loads)
    assert max(loads) <= max((1 + LOCALITY_TOLERANCE) * mean, mean + max(costs)) * (1 + 1e-9)


@settings(max_examples=50)
@given(plans())
def test_the_loads_of_a_window_are_those_of_its_blocks(made: tuple[Plan, list[list[tuple[int, Box]]]]) -> None:
    plan, _ = made
    frequency = plan.matrices[0].frequency
    window = [plan.loads_at(offset) for offset in range(frequency)]
    for rank in range(plan.world_size):
        assert sum(loads[rank] for loads in window) == pytest.approx(frequency * plan.loads[rank])
    refreshing = [sum(loads) > sum(plan.loads_at(frequency - 1)) for loads in window]
    if plan.blocks[0].phase is None and frequency > 1:
        assert refreshing == [True] + [False] * (frequency - 1)


@settings(max_examples=50)
@given(st.integers(2, 8), st.integers(0, 3), st.data())
def test_many_small_blocks_balance_to_a_tenth(ranks: int, skew: int, data: st.DataObject) -> None:
    """If blocks are at most a twentieth of a rank's share, no rank exceeds the mean by 10 % under any sharding."""
    rows = [20 * ranks * (1 + (n * skew) % 3) for n in range(3)]
    matrices = [Matrix((n, 4), 4, 0, 10) for n in rows]
    held: list[list[tuple[int, Box]]] = [[] for _ in range(ranks)]
    for number, n in enumerate(rows):
        cut = data.draw(st.integers(0, n))
        first = data.draw(st.integers(0, ranks - 1))
        second = data.draw(st.integers(0, ranks - 1))
        for rank, box in ((first, Box((0, 0), (cut, 4))), (second, Box((cut, 0), (n - cut, 4)))):
            if box.numel:
                held[rank].append((number, box))
    plan = Plan(matrices, held)
    assert max(b.cost for b in plan.blocks) <= 0.1 * sum(plan.loads) / ranks
    assert plan.imbalance <= 1.1 + 1e-9


def test_a_block_stays_where_it_lies_when_balance_allows() -> None:
    matrices = [Matrix((8, 8), 4, 0, 10)] * 2
    plan = Plan(matrices, [[(0, whole((8, 8)))], [(1, whole((8, 8)))]])
    assert plan.owners == [0] * 4 + [1] * 4
    assert not any(plan.gradients_move) and not any(plan.updates_move)
    assert plan.elements_moved(0) == (0, 0)


def test_buckets_on_accelerators_follow_memory() -> None:
    matrices = [Matrix((4096, 4096), 1024, 0, 10)] * 32  # 512 blocks of 2^20 elements
    rows = [(n, whole((4096, 4096))) for n in range(32)]
    assert Plan(matrices, [rows], None).bucket_count == 256  # of 2 blocks
    assert Plan(matrices, [rows], None, on_accelerators=True).bucket_count == 2  # nothing moves
    halves = [[(n, Box((2048 * r, 0), (2048, 4096))) for n in range(32)] for r in range(2)]
    assert Plan(matrices, halves, None, on_accelerators=True).bucket_count == 1  # nothing moves
    columns = [[(n, Box((0, 2000 * r), (4096, 2000 + 96 * r))) for n in range(32)] for r in range(2)]
    moved = Plan(matrices, columns, None, on_accelerators=True)
    assert any(moved.updates_move) and max(Counter(moved.buckets).values()) <= 2 * 32
    assert Plan(matrices, columns, None).bucket_count > 4 * moved.bucket_count
    assert Plan(matrices, columns, 1 << 20, on_accelerators=True).bucket_count >= 256  # as asked


def test_replicas_move_no_gradients() -> None:
    plan = Plan([Matrix((8, 8), 4, 0, 10)] * 2, [[(0, whole((8, 8))), (1, whole((8, 8)))]] * 2)
    assert all(plan.updates_move) and not any(plan.gradients_move)


def test_replicas_share_the_work_and_each_gets_the_others_updates() -> None:
    plan = Plan([Matrix((8, 8), 4, 0, 10)], [[(0, whole((8, 8)))]] * 2)
    assert sorted(plan.owners) == [0, 0, 1, 1]
    assert plan.elements_moved(0) == (32, 32)
    assert all(not t.gradients_out and not t.gradients_in for rank in (0, 1) for t in plan.transfers(rank))


def test_equally_loaded_ranks_alternate_over_units() -> None:
    """Otherwise the first rank would own all blocks of small units (ZeRO-3 sub-groups)."""
    owners, prior_loads = [], [0.0] * 4
    for _ in range(8):
        held = [[(0, box)] for box in (Box((2 * rank, 0), (2, 8)) for rank in range(4))]
        plan = Plan([Matrix((8, 8), 8, 0, 10)], held, prior_loads=prior_loads)
        owners += plan.owners
        prior_loads = [a + b for a, b in zip(prior_loads, plan.loads, strict=True)]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_side_that_is_switched_off_costs_nothing() -> None:
    def cost(sides: tuple[Side, Side] | None) -> float:
        return step_cost((8, 64), sides) + refresh_cost((8, 64), sides) / 10

    both, left, right = (cost(sides) for sides in (None, ("matrix", "none"), ("none", "matrix")))
    neither = cost(("none", "none"))
    assert both - left == pytest.approx(right - neither) and left < 0.05 * both
    assert left < cost(("matrix", "diagonal")) < 1.5 * left


def filled_buckets(plan: Plan) -> list[list[int]]:
    """Return the elements of each rank's blocks in each bucket."""
    filled = [[0] * plan.bucket_count for _ in range(plan.world_size)]
    for block, owner, bucket in zip(plan.blocks, plan.owners, plan.buckets, strict=True):
        filled[owner][bucket] += block.box.numel
    return filled


@pytest.mark.parametrize("size, equal", [(64, 1), (2048, 4), (4096, 8), (16384, 32)])
def test_a_plan_that_may_choose_makes_eight_buckets_within_bounds(size: int, equal: int) -> None:
    """Buckets have half a million to four million elements for any owners; small ends add up to three buckets."""
    cuts = tuple((min(size, 256),) * (size // min(size, 256)) for _ in range(2))
    middle = size // 2 + 8  # some blocks lie on both, so that something moves
    shards = [[(0, Box((0, 0), (middle, size)))], [(0, Box((middle, 0), (size - middle, size)))]]
    plan = Plan([Matrix((size, size), cuts, 0, 10)], shards, None)
    assert plan.bucket_count == (equal + 3 if equal > 1 else 1)
    for own in filled_buckets(plan):
        assert all(n <= MOST_IN_BUCKET for n in own)
        if equal > 1:
            assert min(own[2:-2]) >= 0.7 * FEWEST_IN_BUCKET
            assert max(own[0], own[-1]) <= 0.35 * max(own) and max(own[1], own[-2]) <= 0.6 * max(own)


def test_where_nothing_moves_buckets_are_smaller() -> None:
    """Two million elements at most on a CPU, a quarter of a billion on an accelerator."""
    matrix = Matrix((16384, 4096), ((256,) * 64, (256,) * 16), 0, 10)
    alone = [[(0, whole(matrix.shape))]]
    for on_accelerators, most in ((False, MOST_THAT_STAYS), (True, MOST_THAT_STAYS_ON_ACCELERATORS)):
        plan = Plan([matrix], alone, None, on_accelerators=on_accelerators)
        assert plan.bucket_count == max(1, 16384 * 4096 // most)


@pytest.mark.parametrize("count", [4, 8, 100])
def test_tapered_buckets_end_where_all_blocks_do_and_none_is_larger_than_an_equal_part(count: int) -> None:
    ends = tapered_ends(count)
    sizes = [b - a for a, b in zip([0.0, *ends], ends, strict=False)]
    assert ends[-1] == pytest.approx(1.0) and max(sizes) <= 1.0 / count + 1e-12 and len(sizes) == count + 3
    assert sizes == pytest.approx(sizes[::-1])
    assert sizes[0] == pytest.approx(sizes[1] / 2) and sizes[1] == pytest.approx(sizes[2] / 2)


def test_one_rank_has_equal_buckets_and_all_ranks_have_equal_shares() -> None:
    """On one rank there is no exchange to hide. A rank with fewer blocks has as many buckets, so no rank waits."""
    cuts = ((8,) * 32, (8,) * 32)
    alone = Plan([Matrix((256, 256), cuts, 0, 10)], [[(0, Box((0, 0), (256, 256)))]], 65536 // 8)
    assert filled_buckets(alone) == [[65536 // 8] * 8]
    shards = [[(0, Box((0, 0), (64, 256)))], [(0, Box((64, 0), (192, 256)))]]
    plan = Plan([Matrix((256, 256), cuts, 0, 10)], shards, 65536 // 16)
    one, other = filled_buckets(plan)
    shares = [[n / sum(own) for n in own] for own in (one, other)]
    assert shares[0] == pytest.approx(shares[1], abs=0.02)


@pytest.mark.parametrize("elements", [1, 32 * 32, 3 * 32 * 32])
def test_blocks_as_large_as_buckets_make_no_more_buckets_than_the_fullest_rank_needs(elements: int) -> None:
    """Each bucket is one collective of all ranks. Here 4 ranks have 33 blocks."""
    cuts = ((32,) * 33, (32,))
    shards = [[(0, Box((264 * rank, 0), (264, 32)))] for rank in range(4)]
    plan = Plan([Matrix((1056, 32), cuts, 0, 10)], shards, elements)
    most = max(len(owned) for owned in plan.owned)
    assert plan.bucket_count == -(-most // max(1, elements // 1024))


def test_a_bucket_of_every_block_is_planned_at_once() -> None:
    """`bucket_mb` may be 0, which gives one bucket per block: here 16,384."""
    cuts = ((8,) * 128, (8,) * 128)
    plan = Plan([Matrix((1024, 1024), cuts, 0, 10)], [[(0, Box((0, 0), (1024, 1024)))]], 1)
    assert plan.bucket_count == 128 * 128
