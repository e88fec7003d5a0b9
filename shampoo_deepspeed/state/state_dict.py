"""The state of step units as one object: taken from live units, kept in state dicts, restored into units."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.algorithm.elementwise import Elementwise
from shampoo_deepspeed.algorithm.formats import stored_forms
from shampoo_deepspeed.distributed.collectives import (
    all_gather_objects,
    first_rank_that,
    gather_on_first_rank,
    on_all_ranks,
)
from shampoo_deepspeed.distributed.frameworks import Shard
from shampoo_deepspeed.distributed.process_groups import cpu_group
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Box, FlatRange, PlacedBox

FORMAT = 1
MOST_STEPS = 1 << 53
# An environment variable: "1" lets a run continue from a checkpoint that has no Shampoo state.
START_ANEW = "SHAMPOO_START_ANEW"


class StateSource(Protocol):
    """Loaded state that is applied when units are built, or used again, at the next step."""

    @property
    def steps(self) -> Mapping[str, int]:
        """Steps taken, by parameter key."""
        ...

    @property
    def rejected_steps(self) -> int:
        """How many steps were rejected."""
        ...

    @property
    def external(self) -> Mapping[str, Any] | None:
        """The note of where the state is kept, if this is only such a note; else None."""
        ...

    def restore_into(self, unit: StepUnit) -> None:
        """Restore a unit's state, on all ranks of its group together.

        Raises:
            ValueError: on all ranks alike, if the state does not fit the parameters or the options.
        """
        ...

    def without(self, keys: set[str]) -> StateSource:
        """The state of all parameters except ``keys``."""
        ...

    def everything(self) -> SavedState:
        """All of the state, in memory."""
        ...


@dataclass
class StackState:
    """Blocks of one shape, each a row of every tensor.

    Args:
        keys: of the blocks, ``"parameter/index"``.
        refreshed: whether a block has been refreshed.
        failures: how many refreshes have failed in a row.
        pending: whether a refresh in the background was under way.
    """

    keys: list[str]
    shape: list[int]
    refreshed: list[bool]
    failures: list[int]
    pending: list[bool]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, stack: BlockStack) -> StackState:
        """The state of a live stack; tensors are the live ones."""
        pending = [row in stack.pending for row in range(len(stack.keys))]
        keys, shape, tensors = list(stack.keys), list(stack.shape), dict(stack.tensors)
        failures = stack.failures if stack.unread else stack.counted_failures
        return cls(keys, shape, list(stack.refreshed), list(failures), pending, tensors)

    @classmethod
    def parse(cls, saved: Mapping[str, Any]) -> StackState:
        """Parse a stack as ``vars`` gave it; early state dicts have no ``pending``."""
        return cls(**{"pending": [False] * len(saved["keys"]), **saved})

    def rows(self, wanted: Callable[[str], bool]) -> StackState:
        """Only the wanted blocks; nothing is copied if all are wanted."""
        kept = [row for row, key in enumerate(self.keys) if wanted(key)]
        if len(kept) == len(self.keys):
            return self

        def of_kept(values: Sequence[Any]) -> list[Any]:
            return [values[row] for row in kept]

        tensors = {n: t[torch.tensor(kept, dtype=torch.long, device=t.device)] for n, t in self.tensors.items()}
        keys, refreshed, failures = of_kept(self.keys), of_kept(self.refreshed), of_kept(self.failures)
        return StackState(keys, self.shape, refreshed, failures, of_kept(self.pending), tensors)

    def on_cpu(self) -> StackState:
        """A copy whose tensors can travel as Python objects."""
        return replace(self, tensors={name: tensor.cpu() for name, tensor in self.tensors.items()})

    def check_fits(self, stack: BlockStack) -> None:
        """Raise ValueError if these blocks do not have the shape and the tensors of a live stack."""
        here = {name: form.shape for name, form in sorted(stack.forms.items())}
        shape, tensors = tuple(self.shape), _row_shapes(self.tensors)
        if shape != stack.shape or tensors != here:
            raise ValueError(
                f"saved state of block {self.keys[0]} has shape {shape} and {tensors}; the options now ask for "
                f"{stack.shape} and {here} (max_preconditioner_dim, one_sided, large_dim, betas, grafting, "
                "preconditioner, ... changed)"
            )

    def load_into(self, stack: BlockStack, row: int, own_row: int) -> None:
        """Copy the block of ``own_row`` into a row, still without state, of a live stack, which it must fit."""
        state = {name: tensor[own_row] for name, tensor in self.tensors.items()}
        refreshed, pending = bool(self.refreshed[own_row]), bool(self.pending[own_row])
        stack.load_row(row, state, refreshed, int(self.failures[own_row]), pending)


@dataclass
class ElementwiseState:
    """Flat ranges of element-wise parameters of one format, one after the other in every tensor.

    Args:
        segments: of each range the parameter key, first element in the flattened parameter, number of elements. Saved
            state dicts have this name and form.
    """

    segments: list[list[Any]]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, part: Elementwise) -> list[ElementwiseState]:
        """The state of a live part by format; tensors are the live ones."""
        segments = [[s.key, s.elements.start, size] for s, size in zip(part.shards, part.sizes, strict=True)]
        return [cls([segments[n] for n in store.numbers], dict(store.tensors)) for store in part.stores]

    def without(self, keys: set[str]) -> ElementwiseState:
        """The ranges of all parameters except ``keys``; nothing is copied if they are not here."""
        kept = [number for number, segment in enumerate(self.segments) if segment[0] not in keys]
        if len(kept) == len(self.segments):
            return self
        sizes = [numel for _, _, numel in self.segments]
        tensors = {}
        for name, tensor in self.tensors.items():
            split = torch.split(tensor, sizes)
            tensors[name] = torch.cat([split[n] for n in kept]) if kept else tensor.new_empty(0)
        return ElementwiseState([self.segments[n] for n in kept], tensors)

    def on_cpu(self) -> ElementwiseState:
        """A copy whose tensors can travel as Python objects."""
        return replace(self, tensors={name: tensor.cpu() for name, tensor in self.tensors.items()})

    def ranges(self) -> Iterator[tuple[str, FlatRange, FlatRange]]:
        """Key of each parameter, its elements, and where they are in the tensors."""
        place = 0
        for key, start, numel in self.segments:
            yield key, FlatRange(start, start + numel), FlatRange(place, place + numel)
            place += numel


@dataclass
class BufferState:
    """A flat buffer of one kind (momentum, master weights) of a local tensor.

    Args:
        shards: parameter key, offsets and lengths of its box, and where that begins in the buffer.
    """

    kind: str
    shards: list[list[Any]]
    buffer: Tensor

    @classmethod
    def of(cls, unit: StepUnit, kind: str, tensor: int) -> BufferState:
        """The state of a live buffer of a local tensor; it is the live one."""
        shards = [
            [unit.parameters[s.parameter].key, list(s.box.offsets), list(s.box.lengths), s.offset]
            for s in unit.layout.shards
            if s.tensor == tensor
        ]
        return cls(kind, shards, unit.buffers[kind][tensor])

    def places(self) -> Iterator[tuple[str, PlacedBox]]:
        """Parameter key of each shard, and where its box is in the buffer."""
        for key, offsets, lengths, offset in self.shards:
            yield key, PlacedBox.contiguous(Box(tuple(offsets), tuple(lengths)), offset)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and 0 <= value < MOST_STEPS


@dataclass
class SavedState:
    """The ``"shampoo"`` part of a state dict: steps by parameter key, and the state that ranks and units had.

    ``external`` is set if the state dict only says where the state is.
    """

    steps: dict[str, int] = field(default_factory=dict)
    stacks: list[StackState] = field(default_factory=list)
    elementwise: list[ElementwiseState] = field(default_factory=list)
    buffers: list[BufferState] = field(default_factory=list)
    rejected_steps: int = 0
    external: Mapping[str, Any] | None = None

    @classmethod
    def of_units(cls, units: Sequence[StepUnit], rejected_steps: int) -> SavedState:
        """This rank's state; tensors are the live ones. ``steps`` names all parameters of the units."""
        saved = cls(rejected_steps=rejected_steps)
        for unit in units:
            saved.steps.update((p.key, n) for p, n in zip(unit.parameters, unit.steps, strict=True))
            saved.stacks += [StackState.of(stack) for stack in unit.stacks]
            saved.elementwise += ElementwiseState.of(unit.elementwise)
            saved.buffers += [BufferState.of(unit, kind, n) for kind, found in unit.buffers.items() for n in found]
        return saved

    @classmethod
    def parse(cls, state_dict: Mapping[str, Any]) -> SavedState:
        """Parse a state dict.

        Raises:
            ValueError: if it has no Shampoo state, or one of another format, or one that no save has made.
        """
        found = state_dict.get("shampoo")
        if not isinstance(found, Mapping):
            raise ValueError(
                "this state dict has no 'shampoo' entry: it was not saved by Shampoo. To continue a run of another "
                "optimizer with Shampoo, load the model alone (engine.load_checkpoint(..., "
                f"load_optimizer_states=False)), or set the environment variable {START_ANEW}=1"
            )
        if found.get("format") != FORMAT:
            raise ValueError(
                f"Shampoo state format {found.get('format')!r} is unknown here; this version reads {FORMAT}"
            )
        if "external" in found:
            return cls(external=found["external"])
        try:
            made = cls(
                dict(found["steps"]),
                [StackState.parse(saved) for saved in found["stacks"]],
                [ElementwiseState(**saved) for saved in found["elementwise"]],
                [BufferState(**saved) for saved in found["buffers"]],
                int(found["rejected_steps"]),
            )
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"the 'shampoo' entry of this state dict is damaged: {error!r}") from error
        made._check_fields()
        return made

    def _check_fields(self) -> None:
        """Raise ValueError for numbers and lists that no save has written."""
        for key, steps in [*self.steps.items(), ("the optimizer", self.rejected_steps)]:
            if not _is_count(steps):
                raise ValueError(
                    f"the saved state of {key} counts {steps!r:.40} steps; allowed: whole numbers from 0 on"
                )
        for stack in self.stacks:
            what, count = f"the saved state of block {stack.keys[:1]}", len(stack.keys)
            for name in ("refreshed", "failures", "pending"):
                numbers = getattr(stack, name)
                if not isinstance(numbers, list) or len(numbers) != count or not all(map(_is_count, numbers)):
                    raise ValueError(
                        f"{what} has {name} = {numbers!r:.40}; allowed: a number for each of {count} blocks"
                    )
            for name, tensor in stack.tensors.items():
                if not isinstance(tensor, Tensor) or tensor.ndim == 0 or len(tensor) != count:
                    raise ValueError(f"{what} has no {name!r} for each of {count} blocks")

    def to_dict(self) -> dict[str, Any]:
        """Builtins and tensors; ``parse`` reads them back."""
        if self.external is not None:
            return {"format": FORMAT, "external": dict(self.external)}
        return {
            "format": FORMAT,
            "steps": self.steps,
            "stacks": [dict(vars(stack)) for stack in self.stacks],
            "elementwise": [dict(vars(part)) for part in self.elementwise],
            "buffers": [dict(vars(buffer)) for buffer in self.buffers],
            "rejected_steps": self.rejected_steps,
        }

    def joined(self, others: Sequence[SavedState]) -> SavedState:
        """This state joined with those of other ranks, or of parameters without a step; copies count once."""
        states = [self, *others]
        return SavedState(
            {key: n for s in states for key, n in s.steps.items()},
            [stack for s in states for stack in s.stacks],
            list({str(part.segments): part for s in states for part in s.elementwise}.values()),
            list({str((b.kind, b.shards)): b for s in states for b in s.buffers}.values()),
            self.rejected_steps,
        )

    def without(self, keys: set[str]) -> SavedState:
        """The state of all parameters except ``keys``; unaffected tensors are not copied."""
        stacks = [stack.rows(lambda key: parameter_of(key) not in keys) for stack in self.stacks]
        parts = [part.without(keys) for part in self.elementwise]
        buffers = [replace(b, shards=[shard for shard in b.shards if shard[0] not in keys]) for b in self.buffers]
        return replace(
            self,
            steps={key: n for key, n in self.steps.items() if key not in keys},
            stacks=[stack for stack in stacks if stack.keys],
            elementwise=[part for part in parts if part.segments],
            buffers=[buffer for buffer in buffers if buffer.shards],
        )

    def on_cpu(self) -> SavedState:
        """A copy whose tensors can travel as Python objects."""
        return replace(
            self,
            stacks=[stack.on_cpu() for stack in self.stacks],
            elementwise=[part.on_cpu() for part in self.elementwise],
            buffers=[replace(b, buffer=b.buffer.cpu()) for b in self.buffers],
        )

    def everything(self) -> SavedState:
        """This state itself, which is in memory."""
        return self

    def rows(self) -> dict[str, tuple[StackState, int]]:
        """Stack and row of each block that is here, by key."""
        return {key: (stack, row) for stack in self.stacks for row, key in enumerate(stack.keys)}

    def missing(self, unit: StepUnit) -> list[str]:
        """Keys of blocks that this rank owns in the unit, that have taken steps, and whose state is not here."""
        rows = self.rows()
        keys = [key for stack in unit.stacks for key in stack.keys]
        return [key for key in keys if key not in rows and self.steps.get(parameter_of(key))]

    def restore_into(self, unit: StepUnit) -> None:
        """Restore a unit's state; blocks are sent to their current owners."""
        group, device = unit.group, unit.device
        with on_all_ranks(group, device):
            self.check_fits(unit)
        missing = self.missing(unit)
        if first_rank_that(bool(missing), group, device) is None:
            self.load_into(unit)
            return
        wanted = {key for keys in all_gather_objects(missing, group, device) for key in keys}
        here = [stack.rows(wanted.__contains__) for stack in self.stacks]
        own = [stack.on_cpu() for stack in here if stack.keys]
        # Whole blocks: an accelerator's group would hold those of all ranks in its memory.
        large = None if group is None else cpu_group(group)
        offers = [stack for stacks in all_gather_objects(own, large) for stack in stacks]
        complete = replace(self, stacks=self.stacks + offers)
        lost = sorted(wanted - set(complete.rows()))
        if lost:
            raise ValueError(lacking(lost[0]))
        with on_all_ranks(group, device):
            complete.check_fits(unit)
        complete.load_into(unit)

    def check_fits(self, unit: StepUnit) -> None:
        """Check that this rank's state fits a unit; blocks that are missing here may be on other ranks.

        Raises:
            ValueError: naming the first parameter or block that does not fit.
        """
        self._check_shapes(unit)
        rows = self.rows()
        for stack in unit.stacks:
            for saved in {id(rows[key][0]): rows[key][0] for key in stack.keys if key in rows}.values():
                saved.check_fits(stack)
        self._check_elements(unit.elementwise)
        for kind in unit.buffers:
            self._check_buffers(unit, kind)

    def load_into(self, unit: StepUnit) -> None:
        """Load a unit's state, which must fit. Parameters that are not in this state start without any."""
        rows = self.rows()
        unit.steps = [int(self.steps.get(p.key, 0)) for p in unit.parameters]
        for stack in unit.stacks:
            for row, key in enumerate(stack.keys):
                if key in rows:
                    saved, own_row = rows[key]
                    saved.load_into(stack, row, own_row)
        self._load_elements(unit.elementwise)
        for kind in unit.buffers:
            for shard, found in self._found_in_buffers(unit, kind):
                for place, buffer in found:
                    target = view_of(unit.buffer(kind, shard.tensor), shard.placed.part(place.box))
                    target.copy_(view_of(buffer, place))

    def _check_shapes(self, unit: StepUnit) -> None:
        """Check that blocks and element-wise parts belong to parameters of the same shapes and policies."""
        shapes = {unit.block_key(n): block.box.lengths for n, block in enumerate(unit.plan.blocks)}
        own = {p.key: p.shape for p in unit.parameters}
        flat = {p.key for p, t in zip(unit.parameters, unit.policies, strict=True) if not t.preconditioned}
        for key, shape in ((key, tuple(stack.shape)) for stack in self.stacks for key in stack.keys):
            if parameter_of(key) in own and shapes.get(key) != shape:
                raise ValueError(
                    f"the saved state has block {key} of shape {shape}, which the parameter of shape "
                    f"{own[parameter_of(key)]} does not have here; its shape, max_preconditioner_dim or exclude differ"
                )
        for key, start, numel in (segment for part in self.elementwise for segment in part.segments):
            if key in own and (key not in flat or start + numel > math.prod(own[key])):
                raise ValueError(
                    f"the saved state has element-wise state of {key!r} up to element {start + numel}, but here it "
                    f"is {'element-wise' if key in flat else 'preconditioned'} with shape {own[key]}"
                )

    def _check_elements(self, part: Elementwise) -> None:
        """Check that moments are here for each element of this rank's shards of parameters that have taken steps."""
        overlaps = self._overlaps(part)
        for number, shard in enumerate(part.shards):
            filled, needed = 0, part.needs[shard.group, shard.method]
            for common, _, saved in overlaps[number]:
                filled += common.size
                missing = needed - set(saved.tensors)
                if missing:
                    raise ValueError(
                        f"saved state of {shard.key} has {sorted(saved.tensors)}, "
                        f"the options now ask for {sorted(missing)} too"
                    )
            if filled != shard.elements.size and self.steps.get(shard.key):
                raise ValueError(
                    f"the saved state holds {filled} of the {shard.elements.size} elements of {shard.key} that this "
                    "rank needs; its shape or the sharding of that run differs"
                )

    def _load_elements(self, part: Elementwise) -> None:
        for number, overlaps in self._overlaps(part).items():
            shard = part.shards[number]
            for common, place, saved in overlaps:
                own = slice(*common.shift(-shard.elements.start))
                for name in part.needs[shard.group, shard.method]:
                    part.load(name, number, own, saved.tensors[name][slice(*place)])

    def _overlaps(self, part: Elementwise) -> dict[int, list[tuple[FlatRange, FlatRange, ElementwiseState]]]:
        """The saved overlaps with each shard of a live part, by its number.

        Each overlap has its elements of the flattened parameter, their place in the tensors, and the saved state.
        """
        saved: dict[str, list[tuple[FlatRange, FlatRange, ElementwiseState]]] = defaultdict(list)
        for state in self.elementwise:
            for key, elements, place in state.ranges():
                saved[key].append((elements, place, state))
        found: dict[int, list[tuple[FlatRange, FlatRange, ElementwiseState]]] = defaultdict(list)
        for number, shard in enumerate(part.shards):
            for elements, place, state in saved[shard.key]:
                common = elements.intersect(shard.elements)
                if common is not None:
                    found[number].append((common, common.shift(place.start - elements.start), state))
        return found

    def _check_buffers(self, unit: StepUnit, kind: str) -> None:
        """Check that buffers of a kind cover all of this rank's shards of the parameters in them."""
        known = {shard[0] for b in self.buffers if b.kind == kind for shard in b.shards}
        for shard, found in self._found_in_buffers(unit, kind):
            key, filled = unit.parameters[shard.parameter].key, sum(place.box.numel for place, _ in found)
            if key in known and filled != shard.box.numel:
                raise ValueError(
                    f"the saved {kind} of {key!r} covers {filled} of the {shard.box.numel} elements needed here"
                )

    def _found_in_buffers(self, unit: StepUnit, kind: str) -> Iterable[tuple[Shard, list[tuple[PlacedBox, Tensor]]]]:
        """For each shard of a unit its overlaps with the saved buffers of a kind, as boxes placed in these."""
        saved: dict[str, list[tuple[PlacedBox, Tensor]]] = defaultdict(list)
        for state in (b for b in self.buffers if b.kind == kind):
            for key, place in state.places():
                saved[key].append((place, state.buffer))
        for shard in unit.layout.shards if saved else ():
            found = []
            for place, buffer in saved[unit.parameters[shard.parameter].key]:
                common = place.box.intersect(shard.box)
                if common is not None:
                    found.append((place.part(common), buffer))
            yield shard, found


def lacking(block_key: str) -> str:
    """The message about a block that a saved state should hold and does not."""
    return f"the saved state has steps of {parameter_of(block_key)!r}, but not its block {block_key!r}"


def consolidated(unit: StepUnit, own: SavedState) -> SavedState:
    """A unit's state from all ranks on the first rank of its group, and on others only their own. A collective."""
    own = own.on_cpu()
    parts = gather_on_first_rank(own, unit.group)
    return own if parts is None else parts[0].joined(parts[1:])


def parameter_of(block_key: str) -> str:
    """The parameter's key within a block key, ``"parameter/index"``."""
    return block_key.rsplit("/", 1)[0]


def view_of(buffer: Tensor, place: PlacedBox) -> Tensor:
    """A box within a flat buffer."""
    return buffer.as_strided(place.box.lengths, place.strides, buffer.storage_offset() + place.offset)


def _row_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a block's state by name, in the order of the names; as the mathematics sees it."""
    forms = stored_forms({name: (tensor.dtype, tensor.shape[1:]) for name, tensor in tensors.items()})
    return {name: form.shape for name, form in sorted(forms.items())}
