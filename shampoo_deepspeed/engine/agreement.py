"""What all ranks agree on before a step: whether it is accepted, whether a gradient is not zero, norms, failing roots.

It also counts steps, and notices replicas whose gradients differ: a rank that owns a block uses its own gradient for
all of them. A step goes through three stages here. ``agree`` runs one small all-reduce before anything is changed.
``count_step`` counts the step of the parameters that take part. ``rejections`` reads the agreed flags on the CPU at the
start of the next step, by which time the copy has completed. It undoes the counts of a rejected step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.algorithm.found_inf import FoundInf
from shampoo_deepspeed.distributed.frameworks import LayoutError
from shampoo_deepspeed.engine.shard_update import ShardGradients
from shampoo_deepspeed.engine.step_unit import LANES, StepUnit
from shampoo_deepspeed.linalg.inverse_root import extremes
from shampoo_deepspeed.options.choices import DTYPES
from shampoo_deepspeed.options.config import ShampooConfig
from shampoo_deepspeed.runtime.devices import Arriving, communication_device

# The positions of the flags; sketches of replicas' gradients follow them.
_BAD, _NONZERO, _FAILING, _APART = range(4)
_FLAGS = 4

# By how much sketches of equal gradients may differ, relatively. All-reduces give all ranks the same bits, but tensor
# parallelism computes replicated gradients on each rank, where kernels may round a number in 16 bits differently.
_ROUNDING = 2.0**-6

# The largest element of a gradient from which float32 factor matrices can be computed if it is not normalized: its
# square may grow by 2^40 in KL-Shampoo's roots and by the size of the block in the sum.
LARGEST_GRADIENT = 2.0**32
# In float64, norms of gradients up to here are finite.
LARGEST_IN_FLOAT64 = 2.0**480
# A gradient is a spike if its norm is so many times the root of its running mean square. With it, second moments and
# factor matrices would be useless for as long as they remember. After n gradients it is SPIKE * (1 + DOUBT / n) times,
# as the mean of a few is not sure yet. docs/reliability.md has the share of usual gradients that count as spikes.
SPIKE, DOUBT = 32.0, 8.0
# If so many steps in a row were rejected as spikes, gradients have another scale now.
SPIKES = 3


class StepFlags:
    """Flags on their way to the CPU, to be read at the next step.

    Args:
        flags: 1-D tensor; on an accelerator it is copied at once, and nothing waits until ``read``.

    Raises:
        LayoutError: on the meta device, as parameters there have no values.
    """

    def __init__(self, flags: Tensor) -> None:
        if flags.device.type == "meta":
            raise LayoutError(
                "the parameters of this step are on the meta device and have no values: give the model memory "
                "(`model.to_empty(device=...)` and its weights) before the optimizer is built"
            )
        self._arriving = None if flags.device.type == "cpu" else Arriving(flags)
        self._flags = flags.clone() if self._arriving is None else flags

    def read(self) -> list[float]:
        """The values; waits for that copy only, not for what was queued since."""
        values: list[float] = self._flags.tolist() if self._arriving is None else self._arriving.read()
        return values


class Unread(NamedTuple):
    """A step whose flags the CPU has not read yet, and which parameters took part in it."""

    flags: StepFlags
    active: list[bool]


class Agreement:
    """What the ranks have agreed on for one `step()` call.

    Args:
        flags: [bad, nonzero, failing, apart], each 0 if no rank of any unit of the call has one.
        norms: for each unit that needs it, ||G||^2 of its parameters.
    """

    def __init__(self, flags: Tensor, norms: Mapping[int, Tensor]) -> None:
        self._flags = flags
        self._norms = norms
        self.flags = StepFlags(flags)

    def found_inf(self, unit: StepUnit) -> FoundInf | None:
        """The flag that masks the step of a unit's tensors; None if the step is known to be accepted."""
        return self._found_inf(unit, unit.device)

    def found_inf_of_blocks(self, unit: StepUnit) -> FoundInf | None:
        """The same flag on the device of the unit's blocks."""
        return self._found_inf(unit, unit.compute_device)

    def _found_inf(self, unit: StepUnit, device: torch.device) -> FoundInf | None:
        flag = (self._flags[_BAD] > 0).to(unit.device)
        if flag.device.type == "cpu":
            if not flag:
                return None
            flag = torch.full((), True, device=device)
        return FoundInf(flag, unit.dtype, lambda: self.flags.read()[_BAD] > 0)

    def refuse_unequal(self, units: Sequence[StepUnit]) -> None:
        """Raise LayoutError if replicas' gradients differ. Later than the first step, an accelerator is not asked."""
        if self._flags.device.type == "cpu" or any(unit.slots and unit.fresh for unit in units):
            _raise_if_apart(self.flags.read(), units)

    def any_gradient(self) -> bool:
        """Whether any element of any gradient is not zero; it is read on the CPU, so call this at first steps only."""
        return bool(self._flags[_NONZERO] > 0)

    def squared_norms(self, unit: StepUnit) -> Tensor | None:
        """||G||^2 of each of the unit's parameters, if a normalized method or ``normalize_gradients`` needs it."""
        return self._norms.get(id(unit))

    def count_step(self, unit: StepUnit, active: Sequence[bool]) -> list[int]:
        """Count a step of the parameters that take part; returns each one's step number, 0 for the others.

        All ranks count alike, without a read of the device; ``rejections`` corrects the counts if necessary.
        """
        unit.unread = Unread(self.flags, list(active))
        unit.steps = [step + part for step, part in zip(unit.steps, active, strict=True)]
        unit.step_tensor.fill_(max(unit.steps))
        return [step if part else 0 for step, part in zip(unit.steps, active, strict=True)]


def rejections(units: Iterable[StepUnit], failure_limit: int) -> Iterator[None]:
    """Read the flags of these units' last steps, and undo the counts of steps that were rejected.

    A rejected step has changed no tensor. The flags have long been copied to the CPU.

    Yields:
        Once for each `step()` call that was rejected.

    Raises:
        RuntimeError: if ``failure_limit`` steps in a row were rejected, or roots of a block failed as often.
        LayoutError: if replicas' gradients differed.
    """
    by_call: dict[int, tuple[StepFlags, list[tuple[StepUnit, list[bool]]]]] = {}
    for unit in units:
        if unit.unread is not None:
            flags, active = unit.unread
            by_call.setdefault(id(flags), (flags, []))[1].append((unit, active))
    for unread, members in by_call.values():
        values = unread.read()
        rejected = values[_BAD] > 0
        for unit, active in members:
            if rejected:
                unit.steps = [step - part for step, part in zip(unit.steps, active, strict=True)]
                unit.step_tensor.fill_(max(unit.steps))
            unit.rejected_in_a_row = unit.rejected_in_a_row + 1 if rejected else 0
            unit.unread = None
        _raise_if_apart(values, [unit for unit, _ in members])
        if rejected:
            yield
        _raise_at_limit(max(unit.rejected_in_a_row for unit, _ in members), values[_FAILING] > 0, failure_limit)


def _raise_at_limit(rejected_in_a_row: int, roots_fail: bool, failure_limit: int) -> None:
    if rejected_in_a_row >= failure_limit:
        raise RuntimeError(
            f"{rejected_in_a_row} steps in a row were rejected because a gradient was not finite or too large "
            f"(failure_limit = {failure_limit}); lower the learning rate, or find out why the loss is not finite"
        )
    if roots_fail:
        raise RuntimeError(
            f"inverse roots of blocks failed {failure_limit} times in a row (failure_limit = {failure_limit}; their "
            "owners' logs name them): their factor matrices are not finite or too ill-conditioned; "
            "lower the learning rate or raise relative_epsilon"
        )


def _raise_if_apart(values: Sequence[float], units: Sequence[StepUnit]) -> None:
    if values[_APART] > 0:
        advice = dict.fromkeys(unit.layout.if_unequal for unit in units if unit.slots)
        raise LayoutError(f"the gradients of replicas differ between ranks: {'; '.join(advice)}")


def agree(work: Sequence[tuple[StepUnit, ShardGradients]], configs: Mapping[int, ShampooConfig]) -> Agreement:
    """Combine this rank's flags with those of all ranks that share a unit of this call.

    One small all-reduce for each unit with several ranks, another if it needs norms, and another without
    ``normalize_gradients``; none with a single rank.

    Raises:
        LayoutError: if this is no time for a step, or replicas' gradients differ; on an accelerator after the first
            step, `rejections` raises the latter.
    """
    home = work[0][0].device if work else torch.device("cpu")
    flags = torch.zeros(_FLAGS, device=home)
    norms: dict[int, Tensor] = {}
    sketches: dict[int, Tensor] = {}
    for unit, gradients in work:
        if unit.layout.may_not_step is not None and (reason := unit.layout.may_not_step()):
            raise LayoutError(reason)
        own, sketches[id(unit)] = _flags(unit, gradients, configs)
        flags = torch.maximum(flags, own.to(home))
        if not all(config.normalize_gradients for config in configs.values()):
            spike = _spike(unit, gradients, configs).to(home)
            flags[_BAD] = torch.maximum(flags[_BAD], spike)
    # Small groups first: the flags of an expert's ranks then reach all ranks through the larger group around them.
    for unit, gradients in sorted(work, key=lambda item: item[0].world_size):
        squares = torch.empty(0, dtype=unit.dtype, device=unit.device)
        if unit.needs_norms or any(configs[number].normalize_gradients for number in unit.elementwise_options):
            squares = unit.elementwise.squared_norms(gradients.decayed, len(unit.parameters)).to(unit.device)
        if unit.group is not None:
            sketch = sketches[id(unit)]
            largest = _reduced(torch.cat([flags.to(sketch), sketch]), dist.ReduceOp.MAX, unit.group)
            flags = _with_apart(largest[:_FLAGS], *largest[_FLAGS:].chunk(2)).to(home)
            squares = _reduced(squares, dist.ReduceOp.SUM, unit.group) if squares.numel() else squares
        norms[id(unit)] = squares
    for whole_step in [unit.layout.whole_step for unit, _ in work if unit.layout.whole_step is not None][:1]:
        flags[_BAD] = whole_step(flags[_BAD])
    agreed = Agreement(flags, {key: n for key, n in norms.items() if n.numel()})
    agreed.refuse_unequal([unit for unit, _ in work])
    return agreed


def _flags(unit: StepUnit, gradients: ShardGradients, configs: Mapping[int, ShampooConfig]) -> tuple[Tensor, Tensor]:
    """This rank's flags, and its sketches of the gradients that other ranks have as well, flat."""
    used = sorted({shard.tensor for shard in unit.layout.shards if gradients.active[shard.parameter]})
    used = [t for t in used if gradients.raw[t].numel()]
    empty = torch.zeros(1, dtype=unit.dtype, device=unit.device)
    peak = decayed = _peaks([gradients.raw[t] for t in used], unit.dtype) if used else empty
    if used and gradients.decayed is not gradients.raw:
        decayed = _peaks([gradients.decayed[t] for t in used], unit.dtype)
    failing = sum(
        failures >= configs[stack.options].failure_limit
        for stack in unit.stacks
        for failures in (stack.failures if stack.unread else stack.counted_failures)  # those of the last step arrived
    )
    limit = _largest(unit, configs)
    bad, some = ~((peak <= limit) & (decayed <= limit)).all(), (peak != 0).any()  # NaN is bad too
    others = torch.full_like(bad, failing, dtype=torch.float32), torch.zeros_like(bad, dtype=torch.float32)
    return torch.stack([bad.float(), some.float(), *others]), _sketch(unit, used, peak.float())


def _sketch(unit: StepUnit, used: Sequence[int], peaks: Tensor) -> Tensor:
    """Sums of the largest magnitudes of gradients, LANES for each set of ranks that hold equal shards, and minus them.

    Lanes split the tensors of a set, so that more than the tensor with the largest gradient counts. For sets of which
    this rank is no member, both are the lowest number.
    """
    if not unit.slots:
        return torch.empty(0, device=peaks.device)
    sums = torch.zeros(unit.slots * LANES + 1, device=peaks.device)  # the last one is of tensors without replicas
    if used:
        sums.index_add_(0, unit.lanes_of(used), torch.nan_to_num(peaks, 0.0, 0.0, 0.0))
    return torch.where(unit.lanes_here(), torch.stack([sums[:-1], -sums[:-1]]), -torch.inf).view(-1)


def _with_apart(flags: Tensor, high: Tensor, minus_low: Tensor) -> Tensor:
    """The flags, with that of unequal replicas set if any sketch differs; a step with it changes nothing."""
    if not high.numel():
        return flags
    apart = ((high + minus_low) > _ROUNDING * high).any() & (flags[_BAD] == 0)
    flags[_APART] = torch.maximum(flags[_APART], apart.float())
    flags[_BAD] = torch.maximum(flags[_BAD], flags[_APART])
    return flags


def _largest(unit: StepUnit, configs: Mapping[int, ShampooConfig]) -> float:
    """The largest magnitude of a gradient's element that a step accepts."""
    wire = configs[unit.parameters[0].group].communication_dtype if unit.parameters else None
    limit = min(torch.finfo(dtype).max for dtype in (unit.dtype, DTYPES[wire] if wire else unit.dtype))
    normalizes = all(config.normalize_gradients for config in configs.values())
    return min(limit, LARGEST_IN_FLOAT64 if normalizes else LARGEST_GRADIENT)


def _spike(unit: StepUnit, gradients: ShardGradients, configs: Mapping[int, ShampooConfig]) -> Tensor:
    """Whether gradients that are not normalized are a spike, the same on all ranks: 0-d float32."""
    steps = _measured_steps(unit, gradients, configs)
    parts = [p for p in unit.shared_parts if steps[p.parameter]]
    own = [gradients.decayed[p.tensor][p.elements] for p in parts]
    norms = torch._foreach_norm(own, 2, torch.float64) if own else []
    now = [(norm.square(), part.share) for norm, part in zip(norms, parts, strict=True)]
    of_rows = [[steps[p] for p in parameters] for parameters in unit.parameters_of_rows]
    before = unit.elementwise.squares_so_far(steps, configs)
    for stack, taken in zip(unit.stacks, of_rows, strict=True):
        if any(taken):
            if stack.narrow:
                before += stack.squares_so_far(taken)
            else:
                before += stack.preconditioner.squares_so_far(stack.tensors, stack.shape, taken)
    energies = torch.stack([_sum(terms, unit.device) for terms in (now, before)])
    if unit.group is not None:
        energies = _reduced(energies, dist.ReduceOp.SUM, unit.group)
    spike = is_spike(energies[0], energies[1], max(steps, default=0))
    return (spike & (unit.rejected_in_a_row < SPIKES)).float()


def _sum(terms: Sequence[tuple[Tensor, float]], device: torch.device) -> Tensor:
    """The sum of 0-d tensors times numbers, which devices get with their kernels; one wait for each other device."""
    products = torch._foreach_mul([value for value, _ in terms], [factor for _, factor in terms]) if terms else []
    total = torch.zeros((), dtype=torch.float64, device=device)
    for other in {product.device: None for product in products}:
        total += torch.stack([product for product in products if product.device == other]).sum().to(device)
    return total


def is_spike(now: Tensor, before: Tensor, seen: int) -> Tensor:
    """Whether gradients are a spike, given ||G||^2 and its running mean after ``seen`` gradients; NaN is one."""
    factor = SPIKE * (1.0 + DOUBT / max(1, seen))
    return (before > 0) & ~(now <= factor * factor * before)


def _measured_steps(unit: StepUnit, gradients: ShardGradients, configs: Mapping[int, ShampooConfig]) -> list[int]:
    """The steps of each parameter, if its state shows how large its gradients, not normalized, have been; else 0."""
    return [
        unit.steps[p] if part and scaled and not configs[policy.options].normalize_gradients else 0
        for p, (part, scaled, policy) in enumerate(zip(gradients.active, unit.scaled, unit.policies, strict=True))
    ]


def _peaks(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The largest magnitude in each tensor, NaN if it contains NaN: [len(tensors)] of this dtype."""
    if tensors[0].device.type == "cpu":
        low, high = extremes(tensors)
        return torch.maximum(-low, high).to(dtype)
    return torch.stack([v.to(dtype) for v in torch._foreach_norm(list(tensors), float("inf"))])


def _reduced(values: Tensor, operation: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> Tensor:
    moved = values.to(communication_device(group, values.device))
    dist.all_reduce(moved, operation, group=group)
    return moved.to(values.device)
