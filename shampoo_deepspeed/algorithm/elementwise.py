"""Parameters that have no factor matrices, updated where their shards lie by a grafting method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.options.config import ShampooConfig


@dataclass(frozen=True)
class Segment:
    """A flat interval of a parameter on this rank.

    ``start`` counts in the flattened global parameter, ``offset`` in the flattened local tensor; ``share`` is one
    over the number of ranks that hold the same interval, ``method`` the grafting method that gives its update.
    """

    parameter: int
    key: str
    group: int
    method: str
    start: int
    numel: int
    tensor: int
    offset: int
    share: float


class Elementwise:
    """First and second moments of all element-wise segments of a unit, each kind in one flat buffer."""

    def __init__(
        self,
        segments: Sequence[Segment],
        configs: Mapping[int, ShampooConfig],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.segments = tuple(segments)
        self._dtype = dtype
        sizes = [s.numel for s in segments]
        self.needs = {(s.group, s.method): moments_of(configs[s.group], s.method) for s in segments}
        used = [name for name in ("exp_avg", "second_moment") if any(name in needs for needs in self.needs.values())]
        self.tensors = {name: torch.zeros(sum(sizes), dtype=dtype, device=device) for name in used}
        self.views = {name: list(torch.split(t, sizes)) if sizes else [] for name, t in self.tensors.items()}

    def squared_norms(self, gradients: Sequence[Tensor], count: int) -> Tensor:
        """This rank's share of each parameter's ||G||^2, as [count] with one entry per parameter of the unit."""
        device = gradients[0].device if gradients else torch.device("cpu")
        squares = torch.zeros(count, dtype=self._dtype, device=device)
        for segment, part in zip(self.segments, self._parts(gradients), strict=True):
            norm = torch.linalg.vector_norm(part.to(self._dtype))
            squares[segment.parameter] += norm.square() * segment.share
        return squares

    def step(
        self,
        gradients: Sequence[Tensor],
        updates: Sequence[Tensor],
        steps: Sequence[int],
        configs: Mapping[int, ShampooConfig],
        found_inf: FoundInf | None,
        squared_norms: Tensor | None,
    ) -> None:
        """Write the segments' updates, given flat gradients and flat update buffers of the unit's tensors.

        Args:
            steps: the number of each parameter's step, counted from 1; those with 0 take no part.
        """
        cohorts: dict[tuple[int, str, int], list[int]] = defaultdict(list)
        for number, segment in enumerate(self.segments):
            if steps[segment.parameter] > 0:
                cohorts[segment.group, segment.method, steps[segment.parameter]].append(number)
        parts, targets = self._parts(gradients), self._parts(updates)
        for (group, method, step), numbers in cohorts.items():
            own = [parts[n].to(self._dtype) for n in numbers]
            if found_inf is not None:
                own = found_inf.masked(own)
            second = []
            if "second_moment" in self.needs[group, method]:
                second = [self.views["second_moment"][n] for n in numbers]
            made, factor = self._updates(numbers, own, second, method, step, configs[group], found_inf, squared_norms)
            torch._foreach_copy_([targets[n] for n in numbers], made)
            if factor != 1.0:
                torch._foreach_mul_([targets[n] for n in numbers], factor)

    def _updates(
        self,
        numbers: Sequence[int],
        gradients: list[Tensor],
        second: list[Tensor],
        method: str,
        step: int,
        config: ShampooConfig,
        found_inf: FoundInf | None,
        squared_norms: Tensor | None,
    ) -> tuple[list[Tensor], float]:
        """Updates of some segments, up to a common factor."""
        scaled = gradients
        if squared_norms is not None and grafting.is_normalized(method):
            norms = squared_norms.sqrt()
            scaled = [
                grafting.normalized(g, norms[self.segments[n].parameter])
                for n, g in zip(numbers, gradients, strict=True)
            ]
        first = [self.views["exp_avg"][n] for n in numbers] if config.betas[0] else []
        warm = grafting.advance(method, first, second, gradients, scaled, step, config, found_inf)
        return warm.updates, warm.factor

    def _parts(self, bases: Sequence[Tensor]) -> list[Tensor]:
        return [bases[s.tensor].narrow(0, s.offset, s.numel) for s in self.segments]

    def export(self) -> dict[str, Any]:
        """State as tensors and builtins; tensors are the live ones."""
        return {"segments": [[s.key, s.start, s.numel] for s in self.segments], "tensors": dict(self.tensors)}

    def incompatibility(self, saved: Sequence[dict[str, Any]], stepped: Mapping[str, int]) -> str | None:
        """Why exported states cannot be taken over for this rank's segments, or None.

        Args:
            stepped: steps by parameter key; of a parameter with steps every element must be there.
        """
        where = _intervals(saved)
        for segment in self.segments:
            filled = 0
            for start, numel, _, tensors in where[segment.key]:
                overlap = min(start + numel, segment.start + segment.numel) - max(start, segment.start)
                filled += max(0, overlap)
                missing = self.needs[segment.group, segment.method] - set(tensors)
                if overlap > 0 and missing:
                    return (
                        f"saved state of {segment.key} has {sorted(tensors)}, "
                        f"the options now ask for {sorted(missing)} too"
                    )
            if filled != segment.numel and stepped.get(segment.key):
                return (
                    f"the saved state holds {filled} of the {segment.numel} elements of {segment.key} that this rank "
                    "needs; its shape is another, or it was saved with another sharding"
                )
        return None

    def load(self, saved: Sequence[dict[str, Any]]) -> None:
        """Take what exported states, which must fit, hold for this rank's segments."""
        where = _intervals(saved)
        for number, segment in enumerate(self.segments):
            for start, numel, position, tensors in where[segment.key]:
                low, high = max(start, segment.start), min(start + numel, segment.start + segment.numel)
                if low >= high:
                    continue
                for name in self.needs[segment.group, segment.method]:
                    target = self.views[name][number].narrow(0, low - segment.start, high - low)
                    target.copy_(tensors[name].narrow(0, position + low - start, high - low))


Interval: TypeAlias = tuple[int, int, int, dict[str, Tensor]]


def _intervals(saved: Sequence[dict[str, Any]]) -> dict[str, list[Interval]]:
    """By parameter key: (start, numel, place in the buffers, buffers) of each saved interval."""
    where: dict[str, list[Interval]] = defaultdict(list)
    for state in saved:
        position = 0
        for key, start, numel in state["segments"]:
            where[key].append((start, numel, position, state["tensors"]))
            position += numel
    return where


def moments_of(config: ShampooConfig, method: str) -> set[str]:
    """The moments that an element-wise parameter has under these options."""
    needs = {"exp_avg"} if config.betas[0] else set()
    return needs | {"second_moment"} if grafting.has_second_moment(method) else needs
