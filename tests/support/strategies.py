"""Hypothesis strategies for geometry: shapes, cuts of flat ranges over ranks, replicas."""

from __future__ import annotations

import math
from itertools import pairwise

from hypothesis import strategies as st

from shampoo_deepspeed.geometry.boxes import Box, FlatRange, range_to_boxes

shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)
matrix_shapes = st.lists(st.integers(2, 8), min_size=2, max_size=3).map(tuple)


@st.composite
def flat_cuts(draw: st.DrawFn, numel: int, ranks: int) -> list[FlatRange]:
    """Draw consecutive ranges of [0, numel), one per rank, some perhaps empty."""
    inner = sorted(draw(st.lists(st.integers(0, numel), min_size=ranks - 1, max_size=ranks - 1)))
    bounds = [0, *inner, numel]
    return [FlatRange(start, stop) for start, stop in pairwise(bounds)]


@st.composite
def sharded(
    draw: st.DrawFn, ranks: int, replicas: int = 1
) -> tuple[list[tuple[int, ...]], list[list[tuple[int, Box]]]]:
    """Draw matrices, and each rank's shards: cut from their concatenation (ZeRO-1/2), or from each matrix (ZeRO-3).

    With replicas, ranks r and r + ranks hold the same.
    """
    matrices = draw(st.lists(matrix_shapes, min_size=1, max_size=3))
    held: list[list[tuple[int, Box]]] = [[] for _ in range(ranks)]
    if draw(st.booleans()):
        cuts = draw(flat_cuts(sum(map(math.prod, matrices)), ranks))
        begin = 0
        for number, shape in enumerate(matrices):
            for rank, (low, high) in enumerate(cuts):
                elements = FlatRange(max(low - begin, 0), min(high - begin, math.prod(shape)))
                held[rank] += [(number, box) for box in range_to_boxes(shape, elements)]
            begin += math.prod(shape)
    else:
        for number, shape in enumerate(matrices):
            for rank, elements in enumerate(draw(flat_cuts(math.prod(shape), ranks))):
                held[rank] += [(number, box) for box in range_to_boxes(shape, elements)]
    return matrices, held * replicas
