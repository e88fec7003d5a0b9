"""Merging of small dims and cutting into blocks: what Shampoo preconditions, by the global shape alone.

Pure integers, no tensors. Blocks never depend on how a host shards a parameter, which is why the trajectory is
the same on any number of ranks.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from shampoo_deepspeed.boxes import Box


def merge_small_dims(shape: Sequence[int], max_dim: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """Merge neighbouring dims while the product stays at most ``max_dim`` and at least a matrix remains.

    Dims of size 1 are dropped; the walk goes from the last dim to the first, so a conv (out, in, kh, kw) becomes
    (out, in * kh * kw) where that fits. Unlike the Distributed Shampoo README's rule (arXiv 2309.06497, section
    "merging"), a matrix is never merged to a vector: a 32x32 weight has two 32x32 factor matrices and not one of
    1024x1024.

    Returns:
        The merged shape, and for each merged dim the original dims that it joins, in order.
    """
    dims = [d for d, n in enumerate(shape) if n != 1]
    merged: list[int] = []
    groups: list[list[int]] = []
    remaining = len(dims)
    for dim in reversed(dims):
        remaining -= 1
        fits = merged and merged[0] * shape[dim] <= max_dim
        if fits and len(merged) + remaining >= 2:
            merged[0] *= shape[dim]
            groups[0].insert(0, dim)
        else:
            merged.insert(0, shape[dim])
            groups.insert(0, [dim])
    return tuple(merged), tuple(tuple(g) for g in groups)


def cut_into_blocks(shape: Sequence[int], max_dim: int) -> list[Box]:
    """The blocks of a merged shape in row-major order, each dim at most ``max_dim``; the last may be shorter."""
    per_dim = [[(start, min(max_dim, n - start)) for start in range(0, n, max_dim)] for n in shape]
    return [
        Box(tuple(start for start, _ in parts), tuple(length for _, length in parts))
        for parts in itertools.product(*per_dim)
    ]


def blocks_touching(shape: Sequence[int], max_dim: int, box: Box) -> list[int]:
    """Indices (in the order of ``cut_into_blocks``) of the blocks that share an element with ``box``."""
    counts = [-(-n // max_dim) for n in shape]
    ranges = [range(o // max_dim, (end - 1) // max_dim + 1) for o, end in zip(box.offsets, box.ends, strict=True)]
    indices = []
    for position in itertools.product(*ranges):
        index = 0
        for i, count in zip(position, counts, strict=True):
            index = index * count + i
        indices.append(index)
    return indices
