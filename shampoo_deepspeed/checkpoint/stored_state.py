"""A checkpoint on disk as the source of the units' state; `tensor_files` describes the names of what is stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack, read_status
from shampoo_deepspeed.checkpoint.errors import CheckpointError
from shampoo_deepspeed.checkpoint.manifest import Manifest, base_key, stored_name
from shampoo_deepspeed.checkpoint.schema import layout_key
from shampoo_deepspeed.checkpoint.tensor_files import Item, Place, TensorFiles, Wanted
from shampoo_deepspeed.distributed.collectives import on_all_ranks
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box, whole
from shampoo_deepspeed.state.block_codec import TRIANGLE, BlockLayout, whole_tensors
from shampoo_deepspeed.state.state_dict import BufferState, ElementwiseState, SavedState, StackState, view_of


@dataclass(frozen=True)
class StoredState:
    """A checkpoint as a `StateSource`: each unit reads what it owns when it is built.

    Args:
        path: the checkpoint.
        keys: parameters whose state no unit has read yet.
        files: of its tensors; None if no state is left in them. They stay open, so that deleting them loses nothing.
    """

    path: Path
    manifest: Manifest
    keys: frozenset[str]
    files: TensorFiles | None

    @property
    def external(self) -> None:
        """None: this is the state itself, not a note."""

    @property
    def rejected_steps(self) -> int:
        """How many steps had been rejected."""
        return self.manifest.rejected_steps

    @property
    def steps(self) -> dict[str, int]:
        """Steps by parameter key."""
        return {
            base_key(name): record["steps"]
            for name, record in self.manifest.parameters.items()
            if base_key(name) in self.keys
        }

    def without(self, keys: set[str]) -> StoredState:
        """The same checkpoint for all parameters except ``keys``."""
        left = self.keys - keys
        records = self.manifest.parameters.items()
        needed = any(record["steps"] for name, record in records if base_key(name) in left)
        return replace(self, keys=left, files=self.files if needed else None)

    def restore_into(self, unit: StepUnit) -> None:
        """Read a unit's state from the files.

        Raises:
            ValueError: on all ranks of the unit, if the state does not fit it.
            CheckpointError: on all ranks of the unit, if a file cannot be read, or has changed since it was loaded.
        """
        try:
            with on_all_ranks(unit.group, unit.device):
                names = {p.key: stored_name(p.key, unit.layout.part) for p in unit.parameters if p.key in self.keys}
                steps = {key: self._steps(name, unit.layout.parts) for key, name in names.items()}
                if self.files is not None:
                    self.files.read(self._wanted(unit, names, {key for key, count in steps.items() if count}))
                unit.steps = [steps.get(p.key, 0) for p in unit.parameters]
        except CheckpointError as error:
            raise CheckpointError(f"the checkpoint {self.path} cannot be loaded: {error}") from error
        except Exception as error:
            raise ValueError(f"the checkpoint {self.path} cannot be loaded: {error}") from error

    def _steps(self, name: str, parts: int) -> int:
        """How many steps a parameter had taken.

        Raises:
            ValueError: if it is missing, or if its name stands for other experts than in a unit with these ``parts``.
        """
        record = self.manifest.parameters.get(name)
        if record is None:
            raise ValueError(f"it was saved with another number of expert-parallel ranks: {name!r} is not in it")
        if record.get("parts", parts) != parts:
            raise ValueError(
                f"it was saved with {record['parts']} expert-parallel ranks, but here are {parts}: "
                f"{name!r} belongs to other experts"
            )
        return int(record["steps"])

    def _wanted(self, unit: StepUnit, names: Mapping[str, str], stepped: set[str]) -> Iterable[Wanted]:
        """What this rank reads for a unit.

        Args:
            names: stored names, by key, of the parameters whose state no unit has read yet.
            stepped: keys of those that have taken steps.
        """
        for stack in unit.stacks:
            yield from self._wanted_blocks(stack, names, stepped)
        views, needs = unit.elementwise.views, unit.elementwise.needs
        for number, shard in enumerate(unit.elementwise.shards):
            for moment in sorted(needs[shard.group, shard.method]) if shard.key in stepped else ():
                view = views[moment][number]
                box = Box((shard.elements.start,), (view.numel(),))
                yield Wanted(Place(names[shard.key], f"elementwise/{moment}", box), view.copy_)
        yield from self._wanted_buffers(unit, names)

    def _wanted_blocks(self, stack: BlockStack, names: Mapping[str, str], stepped: set[str]) -> Iterable[Wanted]:
        layouts: dict[str, BlockLayout] = {}  # by options, as blocks of other groups may have joined
        for row, key in enumerate(stack.keys):
            parameter, _, index = key.rpartition("/")
            if parameter in stepped:
                options = self.manifest.parameters[names[parameter]]["options"]
                if options not in layouts:
                    layouts[options] = self._layout(options, stack, key)
                yield Wanted(Place(names[parameter], int(index)), partial(_fill, stack, row, layouts[options]))

    def _wanted_buffers(self, unit: StepUnit, names: Mapping[str, str]) -> Iterable[Wanted]:
        stored = {} if self.files is None else self.files.tensors
        narrow = [tensor.dtype != unit.dtype for tensor in unit.local_tensors()]
        for shard in unit.layout.shards:
            name = names.get(unit.parameters[shard.parameter].key)
            for kind in unit.buffers:
                # If the framework keeps float32 weights itself, a stored master is not needed.
                needed = kind != "master" or narrow[shard.tensor]
                if name is not None and needed and (name, f"shards/{kind}") in stored:
                    target = view_of(unit.buffer(kind, shard.tensor), shard.placed)
                    yield Wanted(Place(name, f"shards/{kind}", shard.box), target.copy_)

    def _layout(self, options: str, stack: BlockStack, key: str) -> BlockLayout:
        """The layout of stored blocks under these options, for a live stack; ``key`` is that of one of them.

        Raises:
            ValueError: if they do not fit the stack.
        """
        layout = self.manifest.layouts.get(layout_key(options, stack.shape))
        if layout is None:
            raise ValueError(f"it holds no blocks of shape {stack.shape}, which {key} has here")
        saved = {name: shape for name, _, shape in layout[:-1]}
        here = {name: tuple(tensor.shape[1:]) for name, tensor in stack.tensors.items()}
        if saved != here:
            raise ValueError(
                f"block {key} was saved with {sorted(saved.items())}, but here it has {sorted(here.items())}"
            )
        return layout

    def everything(self) -> SavedState:
        """Read all state that no unit has read yet, which must not have expert-parallel parts."""
        stacks: dict[str, _Rows] = {}
        elementwise: dict[str, ElementwiseState] = {}
        buffers = []
        names = [name for name in self.manifest.parameters if base_key(name) in self.keys and self.files is not None]
        for name in sorted(names):
            key = name.removesuffix("@")  # for keys that look like those of parts
            self._add_blocks(stacks, name, key)
            for kind, shape, tensor in self._whole_tensors(name):
                where, _, last = kind.partition("/")
                if where == "elementwise":
                    found = elementwise.setdefault(key, ElementwiseState([[key, 0, tensor.numel()]], {}))
                    found.tensors[last] = tensor
                else:
                    buffers.append(BufferState(last, [[key, [0] * len(shape), list(shape), 0]], tensor.reshape(-1)))
        joined = [rows.stacked() for rows in stacks.values()]
        return SavedState(self.steps, joined, list(elementwise.values()), buffers, self.rejected_steps)

    def _whole_tensors(self, name: str) -> Iterable[tuple[str, tuple[int, ...], Tensor]]:
        """Kind, shape and content of what is stored of a parameter in boxes."""
        assert self.files is not None
        for kind in sorted(self.manifest.parameters[name]["tensors"]):
            _, shape, boxes = self.files.tensors.get((name, kind), (None, (), []))
            if boxes:
                yield kind, shape, self.files.read_one(Place(name, kind, whole(shape)))

    def _add_blocks(self, stacks: dict[str, _Rows], name: str, key: str) -> None:
        record = self.manifest.parameters[name]
        assert self.files is not None
        for index, block in enumerate(cut_into_blocks(record["merged"], record["cuts"]) if record["blocks"] else []):
            options = layout_key(record["options"], block.lengths)
            layout = self.manifest.layouts[options]
            parts = whole_tensors(self.files.read_one(Place(name, index)), layout)
            tensors = dict(zip((part[0] for part in layout), parts, strict=True))
            rows = stacks.setdefault(options, _Rows(list(block.lengths)))
            rows.keys.append(f"{key}/{index}")
            rows.status.append(read_status(tensors.pop("status").tolist()))
            rows.tensors.append(tensors)

    def items(self) -> Iterable[Item]:
        """All state that no unit has read yet, to be written again unchanged; the same on all ranks."""
        return [] if self.files is None else self.files.items(lambda name: base_key(name) in self.keys)


def _fill(stack: BlockStack, row: int, layout: BlockLayout, parts: Sequence[Tensor]) -> None:
    """Load a stored block's tensors into a row, still without state, of a live stack."""
    if any(kind.endswith(TRIANGLE) for _, kind, _ in layout):
        parts = whole_tensors(parts, layout)
    stack.load_row(row, {name: part for (name, _, _), part in zip(layout, parts, strict=True)})


@dataclass
class _Rows:
    """Blocks of one layout, one by one."""

    shape: list[int]
    keys: list[str] = field(default_factory=list)
    status: list[tuple[bool, int, bool]] = field(default_factory=list)
    tensors: list[dict[str, Tensor]] = field(default_factory=list)

    def stacked(self) -> StackState:
        """As one stack."""
        refreshed, failures, pending = (list(column) for column in zip(*self.status, strict=True))
        tensors = {name: torch.stack([row[name] for row in self.tensors]) for name in self.tensors[0]}
        return StackState(self.keys, self.shape, refreshed, failures, pending, tensors)
