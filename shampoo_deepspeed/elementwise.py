"""Parameters that have no factor matrices, updated where their shards lie by a grafting method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed import grafting
from shampoo_deepspeed.config import ShampooConfig
from shampoo_deepspeed.verdict import Verdict


@dataclass(frozen=True)
class Segment:
    """A flat interval of a parameter on this rank.

    ``start`` counts in the flattened global parameter, ``offset`` in the flattened local tensor; ``share`` is one
    over the number of ranks that hold the same interval.
    """

    parameter: int
    key: str
    group: int
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
        parameters: Sequence[int],
        configs: Mapping[int, ShampooConfig],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.segments = tuple(segments)
        self.steps = dict.fromkeys(parameters, 0)
        self._dtype = dtype
        sizes = [s.numel for s in segments]
        self._needs = {s.group: _moments_of(configs[s.group]) for s in segments}
        used = [name for name in ("exp_avg", "second_moment") if any(name in needs for needs in self._needs.values())]
        self.tensors = {name: torch.zeros(sum(sizes), dtype=dtype, device=device) for name in used}
        self._views = {name: list(torch.split(t, sizes)) if sizes else [] for name, t in self.tensors.items()}

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
        directions: Sequence[Tensor],
        active: Sequence[bool],
        configs: Mapping[int, ShampooConfig],
        verdict: Verdict,
        squared_norms: Tensor | None,
    ) -> None:
        """Write the segments' directions, given flat gradients and flat direction buffers of the unit's tensors."""
        for parameter in self.steps:
            self.steps[parameter] += active[parameter]
        cohorts: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, segment in enumerate(self.segments):
            if active[segment.parameter]:
                cohorts[segment.group, self.steps[segment.parameter]].append(number)
        parts, targets = self._parts(gradients), self._parts(directions)
        for (group, step), numbers in cohorts.items():
            own = verdict.cleaned([parts[n].to(self._dtype) for n in numbers])
            made = self._directions(numbers, own, step, configs[group], verdict, squared_norms)
            torch._foreach_copy_([targets[n] for n in numbers], made)

    def _directions(
        self,
        numbers: Sequence[int],
        gradients: list[Tensor],
        step: int,
        config: ShampooConfig,
        verdict: Verdict,
        squared_norms: Tensor | None,
    ) -> list[Tensor]:
        method = config.elementwise_method
        second = [self._views["second_moment"][n] for n in numbers] if grafting.has_second_moment(method) else []
        scaled = gradients
        if grafting.is_normalized(method) and squared_norms is not None:
            norms = squared_norms.sqrt()
            scaled = [
                grafting.normalized(g, norms[self.segments[n].parameter])
                for n, g in zip(numbers, gradients, strict=True)
            ]
        grafting.accumulate(method, second, scaled, config.second_moment_beta, verdict)
        beta1 = config.betas[0] if "exp_avg" in self._views else 0.0
        first = [self._views["exp_avg"][n] for n in numbers] if beta1 else []
        moments = grafting.first_moment(first, gradients, beta1, step, config.use_bias_correction, verdict)
        return grafting.direction(method, moments, second, step, config.second_moment_beta, config.eps)

    def _parts(self, bases: Sequence[Tensor]) -> list[Tensor]:
        return [bases[s.tensor].narrow(0, s.offset, s.numel) for s in self.segments]

    def take_back(self, active: Sequence[bool]) -> None:
        """Undo the count of a step that turned out to be rejected."""
        for parameter in self.steps:
            self.steps[parameter] -= active[parameter]

    def export(self, keys: Sequence[str]) -> dict[str, Any]:
        """State as tensors and builtins; tensors are the live ones. ``keys`` names the unit's parameters."""
        return {
            "steps": {keys[p]: step for p, step in self.steps.items()},
            "segments": [[s.key, s.start, s.numel] for s in self.segments],
            "tensors": dict(self.tensors),
        }

    def load(self, saved: Sequence[dict[str, Any]], keys: Sequence[str]) -> set[str]:
        """Take what the exported states hold for this rank's segments; gives the keys that were found.

        Raises:
            ValueError: where a segment is saved without a moment that the options ask for.
        """
        where: dict[str, list[tuple[int, int, int, dict[str, Tensor]]]] = defaultdict(list)
        steps: dict[str, int] = {}
        for state in saved:
            steps.update(state["steps"])
            position = 0
            for key, start, numel in state["segments"]:
                where[key].append((start, numel, position, state["tensors"]))
                position += numel
        for number, segment in enumerate(self.segments):
            if segment.key in where:
                self._load_segment(number, segment, where[segment.key])
        for parameter in self.steps:
            self.steps[parameter] = int(steps.get(keys[parameter], 0))
        return set(steps)

    def _load_segment(
        self, number: int, segment: Segment, saved: Sequence[tuple[int, int, int, dict[str, Tensor]]]
    ) -> None:
        for start, numel, position, tensors in saved:
            low, high = max(start, segment.start), min(start + numel, segment.start + segment.numel)
            if low >= high:
                continue
            missing = self._needs[segment.group] - set(tensors)
            if missing:
                raise ValueError(
                    f"saved state of {segment.key} has {sorted(tensors)}, "
                    f"the options now ask for {sorted(missing)} too"
                )
            for name in self._needs[segment.group]:
                target = self._views[name][number].narrow(0, low - segment.start, high - low)
                target.copy_(tensors[name].narrow(0, position + low - start, high - low))


def _moments_of(config: ShampooConfig) -> set[str]:
    """The moments that an element-wise parameter has under these options."""
    needs = {"exp_avg"} if config.betas[0] else set()
    return needs | {"second_moment"} if grafting.has_second_moment(config.elementwise_method) else needs
