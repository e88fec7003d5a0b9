"""The runs that replace a full product have all required features."""

from __future__ import annotations

from itertools import product

from tests.support.covering import fewest


def pairs(item: tuple[int, ...]) -> set[object]:
    return {((i, item[i]), (j, item[j])) for i in range(len(item)) for j in range(i)}


def test_the_fewest_have_every_feature() -> None:
    every = list(product(range(2), range(4), range(4)))
    few = fewest(every, pairs)
    assert set().union(*map(pairs, few)) == set().union(*map(pairs, every))
    assert 16 <= len(few) <= 20 and few == sorted(few)
