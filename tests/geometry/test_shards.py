"""What ranks tell each other of their shards is what they hold, in messages that do not grow with the layers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shampoo_deepspeed.geometry.boxes import Box, chunk, whole
from shampoo_deepspeed.geometry.shards import Held, Messages, Shards
from tests.support.strategies import sharded


def named(shapes: Sequence[tuple[int, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    return [(f"layers.{n}.weight", shape) for n, shape in enumerate(shapes)]


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.data())
def test_what_is_read_is_what_was_written(ranks: int, replicas: int, copies: int, data: st.DataObject) -> None:
    """Layers may be sharded alike or not, and some ranks hold nothing of some; equal shardings are one object."""
    shapes, once = data.draw(sharded(ranks, replicas))
    held = [[(n + k * len(shapes), box) for k in range(copies) for n, box in boxes] for boxes in once]
    messages = Messages(named(shapes * copies))
    shards = messages.read([messages.write(data.draw(st.permutations(boxes))) for boxes in held])
    expected = Shards.of_ranks(held, len(shapes) * copies)
    for rank, boxes in enumerate(held):
        assert shards.of_rank(rank) == expected.of_rank(rank) == sorted(boxes)
    for number, sharding in enumerate(shards.shardings):
        assert sharding.parts == expected.shardings[number].parts
        assert all(ranks == tuple(sorted(set(ranks))) for _, ranks in sharding.parts)
        assert sharding is shards.shardings[number % len(shapes)]
        assert [shards.chosen([number]).of_rank(rank) for rank in range(len(held))] == [
            [(0, box) for n, box in sorted(boxes) if n == number] for boxes in held
        ]


@pytest.mark.parametrize("along", [0, 1])
def test_a_message_is_as_long_for_eighty_layers_as_for_two(along: int) -> None:
    def lengths(layers: int, ranks: int) -> set[int]:
        shapes = [(64, 64), (64, 32)] * layers
        parameters = [(f"layers.{n // 2}.{'qo'[n % 2]}", shape) for n, shape in enumerate(shapes)]
        return {len(Messages(parameters).write(rows(shapes, ranks, rank))) for rank in range(ranks)}

    def rows(shapes: Sequence[tuple[int, ...]], ranks: int, rank: int) -> list[Held]:
        held = []
        for n, shape in enumerate(shapes):
            part = chunk(shape[along], ranks, rank)
            box = whole(shape)
            offsets, lengths = list(box.offsets), list(box.lengths)
            offsets[along], lengths[along] = part.start, part.size
            held.append((n, Box(tuple(offsets), tuple(lengths))))
        return held

    assert lengths(2, 4) == lengths(80, 4) == lengths(2, 16) == {2 * (2 + 4)}


def test_layers_that_are_not_alike_keep_their_own_boxes() -> None:
    """The second of three layers lies on another rank."""
    box = whole((4, 4))
    held: list[list[Held]] = [[(0, box), (2, box)], [(1, box)]]
    messages = Messages(named([(4, 4)] * 3))
    shards = messages.read([messages.write(boxes) for boxes in held])
    assert [shards.of_rank(rank) for rank in range(2)] == held
    assert shards.shardings[0] is shards.shardings[2] is not shards.shardings[1]
