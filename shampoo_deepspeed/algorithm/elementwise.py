"""Element-wise parameters, which have no factor matrices: updated on their shards by a grafting method."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.geometry.boxes import FlatRange
from shampoo_deepspeed.linalg.precision import ACCURATE_NORMS
from shampoo_deepspeed.options.config import ShampooConfig

# Elements whose squares are summed in their own dtype; the sums of a longer tensor's rows are added in float64.
NORM_ROW = 4096
# Elements that an accelerator steps at a time, such that what a step holds for a moment stays small next to embeddings.
TOGETHER = 16 << 20


@dataclass(frozen=True)
class ElementwiseShard:
    """A flat range of a parameter on this rank, and how it is updated.

    ``elements`` is its range in the flattened global parameter, ``local`` in the flattened local tensor. ``share`` is
    one over the number of ranks that hold the same range, ``method`` the grafting method that computes its update,
    ``numel`` the number of elements of the global parameter, and ``rate`` the option with the factor on its rate.
    """

    parameter: int
    key: str
    group: int
    method: str
    elements: FlatRange
    tensor: int
    local: FlatRange
    share: float
    numel: int
    rate: str = "elementwise_lr"


class Piece(NamedTuple):
    """Some elements of a shard, all if ``elements`` is None."""

    number: int
    elements: slice | None = None

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """The piece of the shard's own tensor among those of all shards."""
        return tensors[self.number] if self.elements is None else tensors[self.number][self.elements]


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

    @cached_property
    def _parameters(self) -> Tensor:
        """The number of each shard's parameter, on the device."""
        return torch.tensor([shard.parameter for shard in self.shards], dtype=torch.long, device=self._device)

    @cached_property
    def _shares(self) -> Tensor:
        return torch.tensor([shard.share for shard in self.shards], dtype=torch.float64, device=self._device)

    @cached_property
    def _numels(self) -> Tensor:
        return torch.tensor([shard.numel for shard in self.shards], dtype=torch.float64, device=self._device)

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
        """This rank's share of each parameter's ||G||^2: float64 [count], which holds the square of any float32.

        Args:
            count: the number of parameters of the unit.
        """
        device = gradients[0].device if gradients else torch.device("cpu")
        norms = _flat_norms([part.to(self._dtype) for part in self._parts(gradients)]).to(device)
        squares = torch.zeros(count, dtype=torch.float64, device=device)
        return squares.index_add_(0, self._parameters, norms.square() * self._shares)

    def squares_so_far(self, steps: Sequence[int], configs: Mapping[int, ShampooConfig]) -> list[tuple[Tensor, float]]:
        """This rank's share of the running mean of ||G||^2: 0-d float64 tensors and their factors.

        Second moments show it, or first ones if there are none. Parameters with step 0 do not count.
        """
        firsts: list[tuple[Tensor, float]] = []
        seconds: list[tuple[Tensor, float]] = []
        for number, shard in enumerate(self.shards):
            config, step = configs[shard.group].for_elementwise, steps[shard.parameter]
            needs, beta1 = self.needs[shard.group, shard.method], config.betas[0]
            if step and "second_moment" in needs:
                weight = step if shard.method == "adagrad" else 1.0 - config.second_moment_beta**step
                seconds.append((self.views["second_moment"][number], shard.share / weight))
            elif step and beta1:
                factor = grafting.noise_in_first_moment(beta1, step)
                firsts.append((self.views["exp_avg"][number], factor * shard.share))
        found = []
        if firsts:
            norms = torch._foreach_norm([part for part, _ in firsts], 2, torch.float64)
            found += [(norm.square(), factor) for norm, (_, factor) in zip(norms, firsts, strict=True)]
        if seconds:  # none of their elements is negative
            sums = torch._foreach_norm([part for part, _ in seconds], 1, torch.float64)
            found += [(total, factor) for total, (_, factor) in zip(sums, seconds, strict=True)]
        return found

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
        cohorts: dict[tuple[int, str, str, int], list[int]] = defaultdict(list)
        for number, shard in enumerate(self.shards):
            if steps[shard.parameter] > 0:
                cohorts[shard.group, shard.method, shard.rate, steps[shard.parameter]].append(number)
        parts, targets = self._parts(gradients), self._parts(updates)
        means = self._root_mean_squares(squared_norms)
        divisors = means.unbind()
        for (group, method, rate, step), numbers in cohorts.items():
            config = configs[group].for_elementwise
            own_rate: float | None = getattr(config, rate)
            for pieces in self._pieces(numbers):
                own = [piece.of(parts).to(self._dtype) for piece in pieces]
                into = [piece.of(targets) for piece in pieces]
                # The updates' memory is free until they are copied into it.
                if config.normalize_gradients:
                    of = [divisors[piece.number] for piece in pieces]
                    own = [torch.div(g, d, out=t) for g, d, t in zip(own, of, into, strict=True)]
                elif found_inf is not None:
                    torch._foreach_copy_(into, own)
                    own = into
                if found_inf is not None:
                    found_inf.mask_(own)
                made, factor = self._updates(pieces, own, method, step, group, config, found_inf, squared_norms)
                factor *= config.elementwise_lr if own_rate is None else own_rate
                torch._foreach_copy_(into, made)
                if config.normalize_gradients:
                    factors = (grafting.strengths(means, config.eps) * factor).unbind()
                    torch._foreach_mul_(into, [factors[piece.number] for piece in pieces])
                elif factor != 1.0:
                    torch._foreach_mul_(into, factor)

    def _pieces(self, numbers: Sequence[int]) -> Iterator[list[Piece]]:
        """Shards that are stepped together: all on the CPU, on accelerators `TOGETHER` elements at most."""
        if self._device.type == "cpu":
            yield [Piece(n) for n in numbers]
            return
        now: list[Piece] = []
        free = TOGETHER
        for n in numbers:
            start = 0
            while start < self.sizes[n]:
                count = min(free, self.sizes[n] - start)
                now.append(Piece(n) if count == self.sizes[n] else Piece(n, slice(start, start + count)))
                start, free = start + count, free - count
                if not free:
                    yield now
                    now, free = [], TOGETHER
        if now:
            yield now

    def _updates(
        self,
        pieces: Sequence[Piece],
        gradients: list[Tensor],
        method: str,
        step: int,
        group: int,
        config: ShampooConfig,
        found_inf: FoundInf | None,
        squared_norms: Tensor | None,
    ) -> tuple[list[Tensor], float]:
        """Updates of some shards, up to a common factor."""
        scaled, normalizes = gradients, method.startswith(grafting.NORMALIZED)
        shards = [self.shards[piece.number] for piece in pieces]
        if normalizes and config.normalize_gradients:  # the root mean square is 1 now
            scaled = list(torch._foreach_div(gradients, [math.sqrt(shard.numel) for shard in shards]))
        elif normalizes and squared_norms is not None:
            norms = squared_norms.sqrt()
            scaled = [
                grafting.normalized(g, norms[shard.parameter]) for shard, g in zip(shards, gradients, strict=True)
            ]
        first = [piece.of(self.views["exp_avg"]) for piece in pieces] if config.betas[0] else []
        second = []
        if "second_moment" in self.needs[group, method]:
            second = [piece.of(self.views["second_moment"]) for piece in pieces]
        warm = grafting.advance(method, first, second, gradients, scaled, step, config, found_inf)
        return warm.updates, warm.factor

    def _root_mean_squares(self, squared_norms: Tensor | None) -> Tensor:
        """The root mean square of each shard's parameter [shards]; 1 if it is 0 or not finite.

        The masked gradients of a rejected step are zeros, which a division by NaN would spoil.
        """
        if squared_norms is None or not self.shards:
            return torch.empty(0)
        found = (squared_norms.index_select(0, self._parameters) / self._numels).sqrt().to(self._dtype)
        return torch.where((found > 0) & found.isfinite(), found, 1.0)

    def _parts(self, bases: Sequence[Tensor]) -> list[Tensor]:
        return [bases[s.tensor][slice(*s.local)] for s in self.shards]


def moments_of(config: ShampooConfig, method: str) -> set[str]:
    """The moments that an element-wise parameter has under these options."""
    needs = {"exp_avg"} if config.for_elementwise.betas[0] else set()
    return needs | {"second_moment"} if grafting.has_second_moment(method) else needs


def _flat_norms(parts: Sequence[Tensor]) -> Tensor:
    """The norm of each 1-D tensor, in float64 [len(parts)]; accurate for any length, and where squares overflow.

    Long tensors are summed in rows: in float32, one sum of 38 million squares is wrong in the third digit on the CPU,
    so that norms would depend on how ranks cut a parameter.
    """
    if not parts:
        return torch.zeros(0, dtype=torch.float64)
    if parts[0].device.type != "cpu":  # one pass, which memory limits, not the speed of float64
        return torch.stack(list(torch._foreach_norm(list(parts), 2, torch.float64)))
    norms = torch.stack([_norm_by_rows(part) for part in parts])
    least, most = ACCURATE_NORMS[parts[0].dtype]
    for number in ((norms <= least) | (norms >= most)).nonzero().flatten().tolist():
        if parts[number].numel():
            low, high = torch.aminmax(parts[number])
            peak = torch.maximum(-low, high)
            if peak > 0:
                norms[number] = _norm_by_rows(parts[number] / peak) * peak.double()
    return norms


def _norm_by_rows(part: Tensor) -> Tensor:
    """The norm of a 1-D tensor on the CPU, in float64."""
    whole = len(part) // NORM_ROW * NORM_ROW
    if not whole:
        return torch.linalg.vector_norm(part).double()
    rows = torch.linalg.vector_norm(part[:whole].view(-1, NORM_ROW), dim=1)
    return torch.linalg.vector_norm(torch.cat([rows, torch.linalg.vector_norm(part[whole:])[None]]).double())
