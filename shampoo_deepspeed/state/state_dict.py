"""State dicts: live units to builtins and tensors, and saved state back to whoever owns it now."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed.distributed.process_groups import cpu_group
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Box, Placed, row_major
from shampoo_deepspeed.runtime.devices import current_device

FORMAT = 1
# An environment variable: "1" lets a run go on from a checkpoint that has no state of Shampoo's.
START_ANEW = "SHAMPOO_START_ANEW"


class StateSource(Protocol):
    """Loaded state that waits for its units, which are built at the next step."""

    @property
    def steps(self) -> Mapping[str, int]:
        """Steps taken so far, by parameter key."""
        ...

    @property
    def rejected_steps(self) -> int:
        """How many steps were rejected so far."""
        ...

    def restore_into(self, unit: StepUnit) -> None:
        """Give a unit its state, on all ranks of its group together.

        Raises:
            ValueError: on all ranks alike, where the state does not fit the parameters or the options.
        """
        ...

    def without(self, keys: set[str]) -> StateSource:
        """What is left when the parameters ``keys`` are taken out."""
        ...

    def everything(self) -> SavedState:
        """What is left, in memory."""
        ...


@dataclass
class SavedState:
    """The ``"shampoo"`` part of a state dict: steps by parameter key, and lists of what ranks and units exported.

    ``elsewhere`` is set where the state dict only says where the state is.
    """

    steps: dict[str, int]
    stacks: list[dict[str, Any]]
    elementwise: list[dict[str, Any]]
    buffers: list[dict[str, Any]]
    rejected_steps: int = 0
    elsewhere: Mapping[str, Any] | None = None

    @classmethod
    def of_units(cls, units: Sequence[StepUnit], rejected_steps: int) -> SavedState:
        """This rank's state; tensors are the live ones. ``steps`` names all parameters, of whatever owner."""
        saved = cls({}, [], [], [], rejected_steps)
        for unit in units:
            saved.steps.update((p.key, n) for p, n in zip(unit.parameters, unit.steps, strict=True))
            saved.stacks += [stack.export() for stack in unit.stacks]
            saved.elementwise.append(unit.elementwise.export())
            saved.buffers += [
                _buffer(unit, kind, tensor, buffer)
                for kind, buffers in unit.buffers.items()
                for tensor, buffer in buffers.items()
            ]
        return saved

    @classmethod
    def parse(cls, state_dict: Mapping[str, Any]) -> SavedState:
        """Take a state dict apart.

        Raises:
            ValueError: where it has no Shampoo state, or one of another format.
        """
        found = state_dict.get("shampoo")
        if not isinstance(found, Mapping):
            raise ValueError(
                "this state dict has no 'shampoo' entry: it was not saved by Shampoo. To go on with Shampoo from a run "
                "of another optimizer load the model alone (engine.load_checkpoint(..., load_optimizer_states=False)), "
                f"or set the environment variable {START_ANEW}=1"
            )
        if found.get("format") != FORMAT:
            raise ValueError(
                f"Shampoo state format {found.get('format')!r} is unknown here; this version reads {FORMAT}"
            )
        if "elsewhere" in found:
            return cls({}, [], [], [], elsewhere=found["elsewhere"])
        stacks, elementwise, buffers = (list(found[name]) for name in ("stacks", "elementwise", "buffers"))
        return cls(dict(found["steps"]), stacks, elementwise, buffers, int(found["rejected_steps"]))

    def to_dict(self) -> dict[str, Any]:
        """Builtins and tensors; ``parse`` reads them back."""
        names = ("steps", "stacks", "elementwise", "buffers", "rejected_steps")
        return {"format": FORMAT, **{name: getattr(self, name) for name in names}}

    def joined(self, others: Sequence[SavedState]) -> SavedState:
        """This state and those of other ranks (or of parameters without a step so far) as one; copies count once."""
        everything = [self, *others]
        return SavedState(
            {key: n for s in everything for key, n in s.steps.items()},
            [stack for s in everything for stack in s.stacks],
            list({str(part["segments"]): part for s in everything for part in s.elementwise}.values()),
            list({str((b["kind"], b["shards"])): b for s in everything for b in s.buffers}.values()),
            self.rejected_steps,
        )

    def without(self, keys: set[str]) -> SavedState:
        """What is left when the parameters ``keys`` are taken out; what they do not touch is not copied."""
        stacks = [_stack_rows(stack, lambda key: parameter_of(key) not in keys) for stack in self.stacks]
        parts = [_elementwise_without(part, keys) for part in self.elementwise]
        return replace(
            self,
            steps={key: n for key, n in self.steps.items() if key not in keys},
            stacks=[stack for stack in stacks if stack["keys"]],
            elementwise=[part for part in parts if part["segments"]],
            buffers=[left for b in self.buffers if (left := _buffer_without(b, keys))["shards"]],
        )

    def on_cpu(self) -> SavedState:
        """A copy whose tensors can travel as Python objects."""
        return replace(
            self,
            stacks=[_moved(stack) for stack in self.stacks],
            elementwise=[_moved(part) for part in self.elementwise],
            buffers=[{**b, "buffer": b["buffer"].cpu()} for b in self.buffers],
        )

    def problem(self, unit: StepUnit) -> str | None:
        """Why this rank cannot hand a unit its state, or None; blocks that are missing here are no problem yet."""
        shapes = {unit.block_key(n): block.box.lengths for n, block in enumerate(unit.plan.blocks)}
        own = {p.key: p.shape for p in unit.parameters}
        flat = {p.key for p, t in zip(unit.parameters, unit.policies, strict=True) if not t.preconditioned}
        for key, shape in ((key, tuple(stack["shape"])) for stack in self.stacks for key in stack["keys"]):
            if parameter_of(key) in own and shapes.get(key) != shape:
                return (
                    f"the saved state has block {key} of shape {shape}, which the parameter of shape "
                    f"{own[parameter_of(key)]} does not have here; its shape, max_preconditioner_dim or exclude differ"
                )
        for key, start, numel in (segment for part in self.elementwise for segment in part["segments"]):
            if key in own and (key not in flat or start + numel > math.prod(own[key])):
                return (
                    f"the saved state has element-wise state of {key!r} up to element {start + numel}, but here it "
                    f"is {'element-wise' if key in flat else 'preconditioned'} with shape {own[key]}"
                )
        rows = self.rows()
        incompatibilities = (
            stack.incompatibility(rows[key][0]) for stack in unit.stacks for key in stack.keys if key in rows
        )
        found = next((incompatibility for incompatibility in incompatibilities if incompatibility), None)
        return found or unit.elementwise.incompatibility(self.elementwise, self.steps) or self._buffer_problem(unit)

    def missing(self, unit: StepUnit) -> list[str]:
        """Keys of blocks that this rank owns in the unit, that have taken steps, and whose state is not here."""
        rows = self.rows()
        keys = [key for stack in unit.stacks for key in stack.keys]
        return [key for key in keys if key not in rows and self.steps.get(parameter_of(key))]

    def blocks(self, keys: set[str]) -> list[dict[str, Any]]:
        """What of these blocks is here, on the CPU."""
        stacks = [_stack_rows(stack, lambda key: key in keys) for stack in self.stacks]
        return [_moved(stack) for stack in stacks if stack["keys"]]

    def load(self, unit: StepUnit) -> None:
        """Hand a unit its state, which must fit. Parameters that the state does not know at all start anew."""
        rows = self.rows()
        unit.steps = [int(self.steps.get(p.key, 0)) for p in unit.parameters]
        for stack in unit.stacks:
            for row, key in enumerate(stack.keys):
                if key in rows:
                    stack.load_row(row, *rows[key])
        unit.elementwise.load(self.elementwise)
        for kind in unit.buffers:
            for shard, pieces in self._buffer_pieces(unit, kind):
                target = Placed(shard.box, shard.offset, row_major(shard.box.lengths))
                for common, place, buffer in pieces:
                    view_of(unit.buffer(kind, shard.tensor), target.part(common)).copy_(view_of(buffer, place))

    def restore_into(self, unit: StepUnit) -> None:
        """Give a unit what is saved of it; blocks travel to their owners of today."""
        everyones = gathered_from_unit((self.problem(unit), self.missing(unit)), unit)
        for problem, _ in everyones:
            if problem:
                raise ValueError(problem)
        wanted = {key for _, missing in everyones for key in missing}
        if not wanted:
            return self.load(unit)
        offers = [stack for stacks in gathered_from_unit(self.blocks(wanted), unit) for stack in stacks]
        lost = sorted(wanted - {key for stack in offers for key in stack["keys"]})
        if lost:
            raise ValueError(lacking(lost[0]))
        complete = replace(self, stacks=self.stacks + offers)
        problem = next((p for p in gathered_from_unit(complete.problem(unit), unit) if p), None)
        if problem:
            raise ValueError(problem)
        complete.load(unit)

    def everything(self) -> SavedState:
        """All of it is in memory."""
        return self

    def rows(self) -> dict[str, tuple[dict[str, Any], int]]:
        """Stack and row of each block that is here."""
        return {key: (stack, row) for stack in self.stacks for row, key in enumerate(stack["keys"])}

    def _buffer_pieces(self, unit: StepUnit, kind: str) -> list[tuple[Any, list[tuple[Box, Placed, Tensor]]]]:
        """For each shard of a unit the common boxes with saved buffers of a kind, and where those lie."""
        saved: dict[str, list[tuple[Placed, Tensor]]] = {}
        for found in (b for b in self.buffers if b["kind"] == kind):
            for key, offsets, lengths, offset in found["shards"]:
                place = Placed(Box(tuple(offsets), tuple(lengths)), offset, row_major(lengths))
                saved.setdefault(key, []).append((place, found["buffer"]))
        out = []
        for shard in unit.layout.shards:
            pieces = []
            for place, buffer in saved.get(unit.parameters[shard.parameter].key, []):
                common = place.box.intersect(shard.box)
                if common is not None:
                    pieces.append((common, place.part(common), buffer))
            out.append((shard, pieces))
        return out

    def _buffer_problem(self, unit: StepUnit) -> str | None:
        for kind in unit.buffers:
            known = {shard[0] for b in self.buffers if b["kind"] == kind for shard in b["shards"]}
            for shard, pieces in self._buffer_pieces(unit, kind):
                key, filled = unit.parameters[shard.parameter].key, sum(common.numel for common, _, _ in pieces)
                if key in known and filled != shard.box.numel:
                    return f"the saved {kind} of {key!r} covers {filled} of the {shard.box.numel} elements needed here"
        return None


def lacking(block_key: str) -> str:
    """What to say of a block that a saved state should hold and does not."""
    return f"the saved state has steps of {parameter_of(block_key)!r}, but not its block {block_key!r}"


def consolidated(unit: StepUnit, own: SavedState) -> SavedState:
    """A unit's state of all ranks, on the first rank of its group; on the others their own. A collective."""
    own = own.on_cpu()
    if unit.group is None:
        return own
    gathered: list[Any] | None = [None] * unit.world_size if unit.rank == 0 else None
    first = dist.get_global_rank(unit.group, 0)
    dist.gather_object(own.to_dict(), gathered, dst=first, group=cpu_group(unit.group))
    if gathered is None:
        return own
    parts = [SavedState.parse({"shampoo": part}) for part in gathered]
    return parts[0].joined(parts[1:])


def gathered_from_unit(mine: Any, unit: StepUnit) -> list[Any]:
    """What all ranks of a unit's group say. A collective."""
    if unit.group is None:
        return [mine]
    gathered: list[Any] = [None] * unit.world_size
    with current_device(unit.device):
        dist.all_gather_object(gathered, mine, group=unit.group)
    return gathered


def parameter_of(block_key: str) -> str:
    """The parameter's key within a block key, ``"parameter/index"``."""
    return block_key.rsplit("/", 1)[0]


def _stack_rows(stack: dict[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
    """An exported stack with the wanted rows only."""
    kept = [row for row, key in enumerate(stack["keys"]) if wanted(key)]
    if len(kept) == len(stack["keys"]):
        return stack
    names = [name for name in stack if name in ("keys", "refreshed", "failures", "pending")]
    rows = {name: [stack[name][row] for row in kept] for name in names}
    tensors = {name: t[torch.tensor(kept, dtype=torch.long, device=t.device)] for name, t in stack["tensors"].items()}
    return {**stack, **rows, "tensors": tensors}


def _elementwise_without(part: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """An exported element-wise part without the parameters ``keys``."""
    kept = [number for number, segment in enumerate(part["segments"]) if segment[0] not in keys]
    if len(kept) == len(part["segments"]):
        return part
    sizes = [numel for _, _, numel in part["segments"]]
    tensors = {}
    for name, tensor in part["tensors"].items():
        pieces = torch.split(tensor, sizes)
        tensors[name] = torch.cat([pieces[n] for n in kept]) if kept else tensor.new_empty(0)
    return {"segments": [part["segments"][n] for n in kept], "tensors": tensors}


def _buffer_without(buffer: dict[str, Any], keys: set[str]) -> dict[str, Any]:
    """A saved buffer without the shards of the parameters ``keys``."""
    return {**buffer, "shards": [shard for shard in buffer["shards"] if shard[0] not in keys]}


def _moved(part: dict[str, Any]) -> dict[str, Any]:
    return {**part, "tensors": {name: tensor.cpu() for name, tensor in part["tensors"].items()}}


def view_of(buffer: Tensor, place: Placed) -> Tensor:
    """A box within a flat buffer."""
    return buffer.as_strided(place.box.lengths, place.strides, buffer.storage_offset() + place.offset)


def _buffer(unit: StepUnit, kind: str, tensor: int, buffer: Tensor) -> dict[str, Any]:
    shards = [
        [unit.parameters[s.parameter].key, list(s.box.offsets), list(s.box.lengths), s.offset]
        for s in unit.layout.shards
        if s.tensor == tensor
    ]
    return {"kind": kind, "shards": shards, "buffer": buffer}
