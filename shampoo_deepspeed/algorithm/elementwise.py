"""Element-wise parameters, which have no factor matrices: updated on their shards by a grafting method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.geometry.boxes import FlatRange
from shampoo_deepspeed.options.config import ShampooConfig


@dataclass(frozen=True)
class ElementwiseShard:
    """A flat range of a parameter on this rank, and how it is updated.

    ``elements`` is its range in the flattened global parameter, ``local`` in the flattened local tensor. ``share`` is
    one over the number of ranks that hold the same range, ``method`` the grafting method that computes its update,
    ``embedding`` whether the parameter embeds tokens and is not the output head too.
    """

    parameter: int
    key: str
    group: int
    method: str
    elements: FlatRange
    tensor: int
    local: FlatRange
    share: float
    embedding: bool = False


class Elementwise:
    """First and second moments of all element-wise shards of a unit, each kind in one flat buffer."""

    def __init__(
        self,
        shards: Sequence[ElementwiseShard],
        configs: Mapping[int, ShampooConfig],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.shards = tuple(shards)
        self._dtype, self._device = dtype, device
        self.needs = {(s.group, s.method): moments_of(configs[s.group], s.method) for s in shards}
        used = [name for name in ("exp_avg", "second_moment") if any(name in needs for needs in self.needs.values())]
        self.sizes = [s.elements.size for s in shards]
        self.tensors = {name: torch.zeros(sum(self.sizes), dtype=dtype, device=device) for name in used}
        self.views = self._split()

    def _split(self) -> dict[str, list[Tensor]]:
        """Each shard's part of each tensor."""
        return {name: list(torch.split(t, self.sizes)) if self.sizes else [] for name, t in self.tensors.items()}

    def release(self) -> None:
        """Free the state's memory; `renew` must follow before the next step."""
        self.tensors = {name: tensor.to("meta") for name, tensor in self.tensors.items()}
        self.views = {}

    def renew(self) -> None:
        """Start again with new state, after `release`."""
        self.tensors = {name: torch.zeros_like(t, device=self._device) for name, t in self.tensors.items()}
        self.views = self._split()

    def squared_norms(self, gradients: Sequence[Tensor], count: int) -> Tensor:
        """This rank's share of each parameter's ||G||^2, as [count] with one entry per parameter of the unit."""
        device = gradients[0].device if gradients else torch.device("cpu")
        squares = torch.zeros(count, dtype=self._dtype, device=device)
        for shard, part in zip(self.shards, self._parts(gradients), strict=True):
            norm = torch.linalg.vector_norm(part.to(self._dtype))
            squares[shard.parameter] += norm.square() * shard.share
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
        """Write the shards' updates, given flat gradients and flat update buffers of the unit's tensors.

        Args:
            steps: each parameter's step number, counted from 1; parameters with 0 take no part.
        """
        cohorts: dict[tuple[int, str, bool, int], list[int]] = defaultdict(list)
        for number, shard in enumerate(self.shards):
            if steps[shard.parameter] > 0:
                cohorts[shard.group, shard.method, shard.embedding, steps[shard.parameter]].append(number)
        parts, targets = self._parts(gradients), self._parts(updates)
        for (group, method, embedding, step), numbers in cohorts.items():
            own = [parts[n].to(self._dtype) for n in numbers]
            if found_inf is not None:
                own = found_inf.masked(own)
            second = []
            if "second_moment" in self.needs[group, method]:
                second = [self.views["second_moment"][n] for n in numbers]
            config = configs[group].for_elementwise
            made, factor = self._updates(numbers, own, second, method, step, config, found_inf, squared_norms)
            factor *= configs[group].elementwise_factor(embedding)
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
        """Updates of some shards, up to a common factor."""
        scaled = gradients
        if squared_norms is not None and grafting.is_normalized(method):
            norms = squared_norms.sqrt()
            scaled = [
                grafting.normalized(g, norms[self.shards[n].parameter]) for n, g in zip(numbers, gradients, strict=True)
            ]
        first = [self.views["exp_avg"][n] for n in numbers] if config.betas[0] else []
        warm = grafting.advance(method, first, second, gradients, scaled, step, config, found_inf)
        return warm.updates, warm.factor

    def _parts(self, bases: Sequence[Tensor]) -> list[Tensor]:
        return [bases[s.tensor][slice(*s.local)] for s in self.shards]


def moments_of(config: ShampooConfig, method: str) -> set[str]:
    """The moments that an element-wise parameter has under these options."""
    needs = {"exp_avg"} if config.for_elementwise.betas[0] else set()
    return needs | {"second_moment"} if grafting.has_second_moment(method) else needs
