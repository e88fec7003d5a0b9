"""Chooses fewer runs than a full product, so that every feature still occurs in some run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def fewest(items: Iterable[Item], features: Callable[[Item], set[Hashable]]) -> list[Item]:
    """Return few items, in their order, that together have all features of all items.

    The choice is greedy: each time, the item with the most missing features is taken.
    """
    rest = list(items)
    missing: set[Hashable] = set().union(*map(features, rest))
    taken: list[Item] = []
    while missing:
        taken.append(max(rest, key=lambda item: len(features(item) & missing)))
        missing -= features(taken[-1])
    return [item for item in rest if item in taken]
