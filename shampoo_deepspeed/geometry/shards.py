"""Which rank holds which boxes of every parameter, and how a rank tells the others its own in a few numbers.

Pure integers, no tensors. Layers of one shape are usually sharded alike. So a thousand ranks' millions of boxes are a
few tables, and a rank's message names boxes once for all layers.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import NamedTuple, TypeAlias

from shampoo_deepspeed.geometry.boxes import Box

# A rank's boxes as (number of the parameter, box).
Held: TypeAlias = tuple[int, Box]


class HeldBox(NamedTuple):
    """A box and the ranks that hold it in ascending order, more than one if there are replicas."""

    box: Box
    ranks: tuple[int, ...]


class Sharding:
    """The boxes that a parameter is divided into, each with its ranks; parameters that are sharded alike share one.

    Args:
        parts: the boxes, in any order.
    """

    def __init__(self, parts: Iterable[HeldBox]) -> None:
        self.parts = tuple(sorted(parts))
        self._ranks_by_box = dict(self.parts)

    def ranks_of(self, box: Box) -> tuple[int, ...]:
        """The ranks that hold one of the boxes."""
        return self._ranks_by_box[box]

    def of_rank(self, rank: int) -> Sequence[Box]:
        """The boxes of a rank in their order."""
        return self._by_rank.get(rank, ())

    @cached_property
    def _by_rank(self) -> Mapping[int, tuple[Box, ...]]:
        found: dict[int, list[Box]] = defaultdict(list)
        for box, ranks in self.parts:
            for rank in ranks:
                found[rank].append(box)
        return {rank: tuple(boxes) for rank, boxes in found.items()}


class Shards:
    """All ranks' shards, by parameter and by rank.

    Args:
        world_size: number of ranks.
        shardings: that of each parameter.
    """

    def __init__(self, world_size: int, shardings: Sequence[Sharding]) -> None:
        self.world_size = world_size
        self.shardings = shardings

    @classmethod
    def of_ranks(cls, held: Sequence[Sequence[Held]], parameters: int) -> Shards:
        """From each rank's boxes of so many parameters; equal boxes are replicas."""
        by_parameter: list[dict[Box, list[int]]] = [defaultdict(list) for _ in range(parameters)]
        for rank, boxes in enumerate(held):
            for number, box in boxes:
                by_parameter[number][box].append(rank)
        shared = _Shared()
        return cls(len(held), [shared.sharding(boxes.items()) for boxes in by_parameter])

    def of_rank(self, rank: int) -> list[Held]:
        """The boxes of a rank, by parameter and then in the order of boxes."""
        return [(number, box) for number, sharding in enumerate(self.shardings) for box in sharding.of_rank(rank)]

    def chosen(self, numbers: Iterable[int]) -> Shards:
        """The shards of some of the parameters, which are numbered from 0 on in the given order."""
        return Shards(self.world_size, [self.shardings[number] for number in numbers])


class _Shared:
    """Makes equal shardings, and equal tuples of ranks in them, the same objects."""

    def __init__(self) -> None:
        self._shardings: dict[tuple[HeldBox, ...], Sharding] = {}
        self._ranks: dict[tuple[int, ...], tuple[int, ...]] = {}

    def sharding(self, boxes: Iterable[tuple[Box, Sequence[int]]]) -> Sharding:
        """The sharding of these boxes with their ranks."""
        made = Sharding(HeldBox(box, self._together(ranks)) for box, ranks in boxes)
        return self._shardings.setdefault(made.parts, made)

    def _together(self, ranks: Iterable[int]) -> tuple[int, ...]:
        found = tuple(sorted(set(ranks)))
        return self._ranks.setdefault(found, found)


class Messages:
    """Writes and reads ranks' boxes as integers; all ranks must know the same parameters.

    Parameters whose names differ only in numbers, as those of layers do, come one after another. Neighbours with the
    same boxes are one run: how many they are, how many boxes each has, and the offsets and lengths of these.

    Args:
        parameters: the name of each, and the shape to which boxes refer.
    """

    def __init__(self, parameters: Sequence[tuple[str, tuple[int, ...]]]) -> None:
        classes: dict[tuple[str, tuple[int, ...]], list[int]] = defaultdict(list)
        for number, (name, shape) in enumerate(parameters):
            classes[re.sub(r"\d+", "*", name), shape].append(number)
        self._count = len(parameters)
        self._classes = [(members, len(shape)) for (_, shape), members in classes.items()]

    def write(self, held: Iterable[Held]) -> list[int]:
        """The boxes of one rank."""
        boxes: dict[int, list[Box]] = defaultdict(list)
        for number, box in held:
            boxes[number].append(box)
        numbers: list[int] = []
        for members, _ in self._classes:
            for same, run in groupby(sorted(boxes[number]) for number in members):
                numbers += [len(list(run)), len(same)]
                for box in same:
                    numbers += [*box.offsets, *box.lengths]
        return numbers

    def read(self, messages: Sequence[Sequence[int]]) -> Shards:
        """All ranks' shards. The work does not grow with ranks times layers if layers are sharded alike."""
        ranks_of: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for rank, numbers in enumerate(messages):
            ranks_of[tuple(numbers)].append(rank)
        found = [(self._parsed(numbers), ranks) for numbers, ranks in ranks_of.items()]
        shared = _Shared()
        shardings: dict[int, Sharding] = {}
        for place, (members, _) in enumerate(self._classes):
            for begin, end, boxes in _joined([(runs[place], ranks) for runs, ranks in found], len(members)):
                sharding = shared.sharding(boxes.items())
                shardings.update((number, sharding) for number in members[begin:end])
        return Shards(len(messages), [shardings[number] for number in range(self._count)])

    def _parsed(self, numbers: Sequence[int]) -> list[list[_Run]]:
        """The runs of each class in one rank's message."""
        found, rest = [], iter(numbers)
        for members, dims in self._classes:
            runs: list[_Run] = []
            while not runs or runs[-1].end < len(members):
                begin = runs[-1].end if runs else 0
                end, count = begin + next(rest), next(rest)
                runs.append(_Run(begin, end, [Box(_next(rest, dims), _next(rest, dims)) for _ in range(count)]))
            found.append(runs)
        return found


class _Run(NamedTuple):
    """Parameters of a class, from ``begin`` up to but not including ``end``; a rank holds these boxes of each."""

    begin: int
    end: int
    boxes: list[Box]


def _next(numbers: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(islice(numbers, count))


def _joined(
    found: Sequence[tuple[Sequence[_Run], Sequence[int]]], count: int
) -> Iterator[tuple[int, int, dict[Box, list[int]]]]:
    """Parameters of a class that every rank holds alike, as (begin, end, ranks by box), from the runs of all ranks."""
    begins = sorted({run.begin for runs, _ in found for run in runs})
    place = {begin: n for n, begin in enumerate([*begins, count])}
    boxes: list[dict[Box, list[int]]] = [defaultdict(list) for _ in begins]
    for runs, ranks in found:
        for run in runs:
            for alike in boxes[place[run.begin] : place[run.end]] if run.boxes else ():
                for box in run.boxes:
                    alike[box] += ranks
    return zip(begins, [*begins[1:], count], boxes, strict=True)
