"""Fewer runs than a full product, where each of a list of features must be seen in some run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

Item = TypeVar("Item")


def fewest(items: Iterable[Item], features: Callable[[Item], set[Hashable]]) -> list[Item]:
    """Some of the items, in their order, that together have all features of all; each time the one with most that are
    new is taken."""
    rest = list(items)
    missing: set[Hashable] = set().union(*map(features, rest))
    taken: list[Item] = []
    while missing:
        taken.append(max(rest, key=lambda item: len(features(item) & missing)))
        missing -= features(taken[-1])
    return [item for item in rest if item in taken]
