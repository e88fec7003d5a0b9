"""Merges small dims and cuts parameters into blocks, by the global shape alone.

Pure integers, no tensors. Blocks never depend on how a framework shards a parameter. That is why training is the same
on any number of ranks.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from typing import Literal, TypeAlias

from shampoo_deepspeed.geometry.boxes import Box

# What a dim of a block has: a factor matrix, a vector of its diagonal, or nothing.
Side: TypeAlias = Literal["matrix", "diagonal", "none"]
# How a shape is cut: into blocks of at most this length along every dim, or of these lengths along each dim.
Cuts: TypeAlias = int | Sequence[Sequence[int]]


def merge_small_dims(
    shape: Sequence[int], max_dim: int, batch_dims: int = 0, merge: bool = True
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merge neighbouring dims while the product stays at most ``max_dim`` and at least two dims remain.

    Dims of size 1 are dropped. Merging starts at the last dim, so a conv weight (out, in, kh, kw) becomes
    (out, in * kh * kw) if that fits. Unlike the Distributed Shampoo README's rule (arXiv 2309.06497, section
    "merging"), a matrix is never merged into a vector: a 32x32 weight has two 32x32 factor matrices, not one of
    1024x1024.

    Args:
        batch_dims: number of leading dims that are left as they are.
        merge: if False, only dims of size 1 are dropped.

    Returns:
        The merged shape, and for each merged dim the original dims that it joins, in order.
    """
    dims = [d for d, n in enumerate(shape) if n != 1 and d >= batch_dims]
    merged: list[int] = []
    groups: list[list[int]] = []
    remaining = len(dims)
    for dim in reversed(dims):
        remaining -= 1
        fits = merge and merged and merged[0] * shape[dim] <= max_dim
        if fits and len(merged) + remaining >= 2:
            merged[0] *= shape[dim]
            groups[0].insert(0, dim)
        else:
            merged.insert(0, shape[dim])
            groups.insert(0, [dim])
    batch = range(min(batch_dims, len(shape)))
    return (*(shape[d] for d in batch), *merged), (*((d,) for d in batch), *(tuple(g) for g in groups))


def sides_of(
    shape: Sequence[int], max_dim: int, large_dim: str = "block", one_sided: str | None = None, batch_dims: int = 0
) -> tuple[Side, ...]:
    """What each dim of a merged shape has: a factor matrix, a diagonal or nothing.

    The answer is the same for the shape of any block that ``cut_lengths`` makes of it.

    Args:
        large_dim: what a dim above ``max_dim`` has: a matrix ("block"), a diagonal ("diagonal") or nothing
            ("identity").
        one_sided: the only dim that has a factor: "left" (first), "right" (last) or "smaller" (the first of the
            smallest ones).
        batch_dims: number of leading dims that have nothing; ``one_sided`` ignores them.
    """
    own = range(batch_dims, len(shape))
    chosen = set(own)
    if one_sided is not None and chosen:
        best = {"left": own[0], "right": own[-1], "smaller": min(own, key=lambda dim: shape[dim])}
        chosen = {best[one_sided]}
    large: dict[str, Side] = {"diagonal": "diagonal", "identity": "none"}
    sides: list[Side] = []
    for dim, n in enumerate(shape):
        side = large.get(large_dim, "matrix") if n > max_dim else "matrix"
        sides.append(side if dim in chosen else "none")
    return tuple(sides)


def cut_lengths(
    shape: Sequence[int], max_dim: int, sides: Sequence[Side], batch_dims: int = 0, split: Sequence[int] = ()
) -> tuple[tuple[int, ...], ...]:
    """Lengths of the blocks along each dim of a merged shape.

    A dim with a factor matrix is cut into lengths of at most ``max_dim``. A dim without one is not cut, as that would
    gain nothing. Batch dims are cut into single matrices. ``split`` first cuts the first dim whose length is its sum.

    Raises:
        ValueError: if no dim has the length that ``split`` adds up to.
    """
    first = next((dim for dim in range(batch_dims, len(shape)) if shape[dim] == sum(split)), None)
    if split and first is None:
        raise ValueError(f"split = {list(split)} adds up to {sum(split)}, and no dim of {tuple(shape)} is that long")
    lengths = []
    for dim, (n, side) in enumerate(zip(shape, sides, strict=True)):
        parts = split if split and dim == first else (n,)
        longest = 1 if dim < batch_dims else max_dim if side == "matrix" else n
        lengths.append(tuple(length for part in parts for length in _even(part, longest)))
    return tuple(lengths)


def even_cuts(shape: Sequence[int], max_dim: int) -> tuple[tuple[int, ...], ...]:
    """Lengths of blocks of at most ``max_dim`` along every dim; the last ones may be shorter."""
    return tuple(_even(n, max_dim) for n in shape)


def _even(n: int, longest: int) -> tuple[int, ...]:
    return tuple(min(longest, n - start) for start in range(0, n, longest)) if n else ()


def _starts(shape: Sequence[int], cuts: Cuts) -> list[list[int]]:
    """Where blocks begin along each dim, and where the last one ends."""
    lengths = even_cuts(shape, cuts) if isinstance(cuts, int) else cuts
    return [[0, *itertools.accumulate(along)] for along in lengths]


def cut_into_blocks(shape: Sequence[int], cuts: Cuts) -> list[Box]:
    """The blocks of a merged shape in row-major order; if only their size is given, the last may be shorter."""
    per_dim = [list(itertools.pairwise(starts)) for starts in _starts(shape, cuts)]
    return [
        Box(tuple(start for start, _ in parts), tuple(stop - start for start, stop in parts))
        for parts in itertools.product(*per_dim)
    ]


def blocks_touching(shape: Sequence[int], cuts: Cuts, box: Box) -> list[int]:
    """Indices (in the order of ``cut_into_blocks``) of the blocks that share an element with ``box``."""
    along = _starts(shape, cuts)
    counts = [len(starts) - 1 for starts in along]
    ranges = [
        range(bisect_right(starts, o) - 1, bisect_right(starts, end - 1))
        for starts, o, end in zip(along, box.offsets, box.ends, strict=True)
    ]
    indices = []
    for position in itertools.product(*ranges):
        index = 0
        for i, count in zip(position, counts, strict=True):
            index = index * count + i
        indices.append(index)
    return indices
