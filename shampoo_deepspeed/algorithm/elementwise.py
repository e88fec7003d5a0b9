"""Element-wise parameters, which have no factor matrices: updated on their shards by a grafting method.

Moments are stored as ``elementwise_format`` says: as they are computed, or in bfloat16, rounded at random
(`formats.to_bfloat16`). The bits are a hash of the parameter's key, the moment's name, the step, and the element of the
flattened *global* parameter, so they do not depend on how frameworks cut it.

There is no ``"int8"`` here. Its runs of 32 elements share a scale, for which one rank must see all of a run. ZeRO and
FSDP1 cut a parameter (or a flat buffer of many) at any element, FSDP2 at rows of any length, and another number of
ranks cuts in other places. So an edge would have to be exchanged at each step, or training would depend on the cut.
Blocks have no such edges: their state lies whole with its owner. bfloat16 needs nothing but the element itself.
"""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm import grafting
from shampoo_deepspeed.algorithm.formats import bits_of_ranges, salts_of, seeds_of, to_bfloat16
from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.geometry.boxes import BaseBox, Box, FlatRange, PlacedBox, Take
from shampoo_deepspeed.linalg.precision import ACCURATE_NORMS
from shampoo_deepspeed.options.config import ShampooConfig

logger = logging.getLogger("shampoo_deepspeed")

# Elements that are updated together, which bounds temporaries. An accelerator needs more of them for each launch.
TOGETHER, TOGETHER_ON_ACCELERATORS = 1 << 18, 16 << 20
# Elements whose squares are summed in their own dtype; the sums of a longer tensor's rows are added in float64.
NORM_ROW = 4096


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


# Some elements of one shard: its number, and where they are in it.
Piece: TypeAlias = tuple[int, slice]


@dataclass
class Store:
    """The moments of all shards that are stored in one dtype, one shard after the other in every tensor.

    Args:
        numbers: of the shards.
        tensors: by the moment's name.
    """

    numbers: list[int]
    dtype: torch.dtype
    tensors: dict[str, Tensor]


class Elementwise:
    """First and second moments of all element-wise shards of a unit, each kind in one flat buffer for each dtype."""

    def __init__(
        self,
        shards: Sequence[ElementwiseShard],
        configs: Mapping[int, ShampooConfig],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._take(shards, configs)
        self._dtype, self._device = dtype, device
        self._used = [n for n in ("exp_avg", "second_moment") if any(n in needs for needs in self.needs.values())]
        self.sizes = [s.elements.size for s in shards]
        formats = [configs[s.group].elementwise_format for s in shards]
        narrow = [number for number, form in enumerate(formats) if form == "bfloat16"]
        wide = [number for number, form in enumerate(formats) if form != "bfloat16"]
        found = [(wide, dtype), (narrow, torch.bfloat16)]
        self.stores = [Store(numbers, of, {}) for numbers, of in found if numbers or (of == dtype and not narrow)]
        self.views: dict[str, list[Tensor]] = {}
        self.renew()

    def _take(self, shards: Iterable[ElementwiseShard], configs: Mapping[int, ShampooConfig]) -> None:
        self.shards = tuple(shards)
        self.needs = {(s.group, s.method): moments_of(configs[s.group], s.method) for s in self.shards}

    def use_methods(self, methods: Sequence[str], configs: Mapping[int, ShampooConfig]) -> None:
        """Update by these methods of all parameters from now on; they need the moments that are there."""
        self._take([replace(shard, method=methods[shard.parameter]) for shard in self.shards], configs)

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

    @cached_property
    def _salts(self) -> Tensor:
        return salts_of([shard.key for shard in self.shards], self._device)

    def release(self) -> None:
        """Free the state's memory; `renew` must follow before the next step."""
        for store in self.stores:
            store.tensors = {}
        self.views = {}

    def renew(self) -> None:
        """Start with new state, also after `release`."""
        self.views = {name: [torch.empty(0)] * len(self.shards) for name in self._used}
        for store in self.stores:
            sizes = [self.sizes[number] for number in store.numbers]
            for name in self._used:
                store.tensors[name] = torch.zeros(sum(sizes), dtype=store.dtype, device=self._device)
                for number, view in zip(store.numbers, torch.split(store.tensors[name], sizes), strict=True):
                    self.views[name][number] = view
        self._has_converted = False

    @property
    def tensors(self) -> list[tuple[str, Tensor]]:
        """All stored tensors, with the names of their moments."""
        return [item for store in self.stores for item in store.tensors.items()]

    def load(self, name: str, number: int, elements: slice, values: Tensor) -> None:
        """Load saved values of some elements of a shard's moment; those of another format are rounded to nearest."""
        target = self.views[name][number][elements]
        target.copy_(values)
        if (target.dtype == torch.bfloat16) != (values.dtype == torch.bfloat16) and not self._has_converted:
            self._has_converted = True
            logger.warning(
                "moments of element-wise parameters were saved in other formats, and are converted: %s of %s from %s "
                "to %s",
                name,
                self.shards[number].key,
                *(str(dtype).removeprefix("torch.") for dtype in (values.dtype, target.dtype)),
            )

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
        updates: Sequence[Tensor] | Take[Tensor],
        steps: Sequence[int],
        configs: Mapping[int, ShampooConfig],
        found_inf: FoundInf | None,
        squared_norms: Tensor | None,
    ) -> None:
        """Compute the shards' updates, given flat gradients of the unit's tensors.

        Args:
            updates: flat buffers of the unit's tensors, which get them; or a function that gets them piece by piece,
                with the place of each in a tensor.
            steps: each parameter's step number, counted from 1; parameters with 0 take no part.
        """
        cohorts: dict[tuple[int, str, str, int], list[int]] = defaultdict(list)
        for number, shard in enumerate(self.shards):
            if steps[shard.parameter] > 0:
                cohorts[shard.group, shard.method, shard.rate, steps[shard.parameter]].append(number)
        parts, targets = self._parts(gradients), [] if callable(updates) else self._parts(updates)
        means = self._root_mean_squares(squared_norms)
        divisors = means.unbind()
        for (group, method, rate, step), numbers in cohorts.items():
            config = configs[group].for_elementwise
            own_rate: float | None = getattr(config, rate)
            scale = config.elementwise_lr if own_rate is None else own_rate
            for batch in self._batches(numbers):
                own = [parts[n][where].to(self._dtype) for n, where in batch]
                if callable(updates):
                    places = [torch.empty_like(g, memory_format=torch.contiguous_format) for g in own]
                else:
                    places = [targets[n][where] for n, where in batch]
                # The updates' memory is free until they are copied into it.
                if config.normalize_gradients:
                    own = [torch.div(g, divisors[n], out=p) for (n, _), g, p in zip(batch, own, places, strict=True)]
                elif found_inf is not None:
                    torch._foreach_copy_(places, own)
                    own = places
                if found_inf is not None:
                    found_inf.mask_(own)
                made, factor = self._updates(batch, own, method, step, group, config, found_inf, squared_norms)
                factor *= scale
                torch._foreach_copy_(places, made)
                if config.normalize_gradients:
                    factors = (grafting.strengths(means, config.eps) * factor).unbind()
                    torch._foreach_mul_(places, [factors[n] for n, _ in batch])
                elif factor != 1.0:
                    torch._foreach_mul_(places, factor)
                if callable(updates):
                    updates([self._place(piece) for piece in batch], places)

    def _place(self, piece: Piece) -> BaseBox:
        """The tensor of a piece, and where it is in that."""
        number, where = piece
        shard = self.shards[number]
        box = Box((where.start,), (where.stop - where.start,))
        return shard.tensor, PlacedBox.contiguous(box, shard.local.start + where.start)

    def _batches(self, numbers: Sequence[int]) -> Iterator[list[Piece]]:
        """The elements of these shards, in pieces that are updated together."""
        most = TOGETHER if self._device.type == "cpu" else TOGETHER_ON_ACCELERATORS
        batch: list[Piece] = []
        room = most
        for number in numbers:
            begin, size = 0, self.sizes[number]
            while begin < size:
                end = min(size, begin + room)
                batch.append((number, slice(begin, end)))
                begin, room = end, room - (end - begin)
                if not room:
                    yield batch
                    batch, room = [], most
        if batch:
            yield batch

    def _updates(
        self,
        batch: Sequence[Piece],
        gradients: list[Tensor],
        method: str,
        step: int,
        group: int,
        config: ShampooConfig,
        found_inf: FoundInf | None,
        squared_norms: Tensor | None,
    ) -> tuple[list[Tensor], float]:
        """Updates of some pieces of shards with the same options, up to a common factor."""
        scaled, normalizes = gradients, method.startswith(grafting.NORMALIZED)
        if normalizes and config.normalize_gradients:  # the root mean square is 1 now
            scaled = list(torch._foreach_div(gradients, [math.sqrt(self.shards[n].numel) for n, _ in batch]))
        elif normalizes and squared_norms is not None:
            norms = squared_norms.sqrt()
            scaled = [
                grafting.normalized(g, norms[self.shards[n].parameter])
                for (n, _), g in zip(batch, gradients, strict=True)
            ]
        moments = {name: self._moments(name, batch) for name in self.needs[group, method]}
        first, second = moments.get("exp_avg", []), moments.get("second_moment", [])
        warm = grafting.advance(method, first, second, gradients, scaled, step, config, found_inf)
        for name, values in moments.items() if config.elementwise_format == "bfloat16" else ():
            self._store(name, batch, values, step)
        return warm.updates, warm.factor

    def _moments(self, name: str, batch: Sequence[Piece]) -> list[Tensor]:
        """Moments of some pieces of shards with one format: the stored ones, or copies as the mathematics sees them."""
        stored = [self.views[name][n][where] for n, where in batch]
        if stored[0].dtype == self._dtype:
            return stored
        return list(torch.split(torch.cat(stored).to(self._dtype), [part.numel() for part in stored]))

    def _store(self, name: str, batch: Sequence[Piece], values: Sequence[Tensor], step: int) -> None:
        """Store what `_moments` has copied, rounded at random."""
        seeds = seeds_of(self._salts, name, step).unbind()
        ranges = [(self.shards[n].elements.start + where.start, where.stop - where.start) for n, where in batch]
        bits = bits_of_ranges([seeds[n] for n, _ in batch], ranges)
        rounded = to_bfloat16(torch.cat(list(values)).float(), bits)
        targets = [self.views[name][n][where] for n, where in batch]
        torch._foreach_copy_(targets, list(torch.split(rounded, [count for _, count in ranges])))

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
