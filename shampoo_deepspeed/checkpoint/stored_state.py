"""A checkpoint on disk as the source of the units' state: blocks, and boxes put together from those that are stored.

`tensor_files` describes the names of what is stored. It is used as it is read, one block or box at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack, read_status
from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.checkpoint.schema import base_key, layout_key, stored_name
from shampoo_deepspeed.checkpoint.tensor_files import SLAB, Item, Place, Stored, TensorFiles, size_of
from shampoo_deepspeed.distributed.collectives import on_all_ranks
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box, whole
from shampoo_deepspeed.runtime.progress import LARGE, UNSHOWN, mebibytes, progress
from shampoo_deepspeed.state.block_codec import TRIANGLE, BlockLayout, shapes_in, whole_tensors
from shampoo_deepspeed.state.state_dict import BufferState, ElementwiseState, SavedState, StackState, view_of


@dataclass(frozen=True)
class Wanted:
    """A block, or any box of a stored tensor, that this rank wants.

    Args:
        take: gets the stored tensors, or the box.
        memory: where to read a block's tensors, as bytes, so that they need not be copied there; None: anywhere.
    """

    place: Place
    take: Callable[[Any], object]
    memory: Sequence[Tensor | None] | None = None


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
            CheckpointError: on all ranks of the unit, if a file cannot be read, or has changed since it was loaded, or
                if there is no memory for it.
        """
        try:
            with on_all_ranks(unit.group, unit.device):
                names = {p.key: stored_name(p.key, unit.layout.part) for p in unit.parameters if p.key in self.keys}
                steps = {key: self._steps(name, unit.layout.parts) for key, name in names.items()}
                if self.files is not None:
                    read(self.files, self._wanted(unit, names, {key for key, count in steps.items() if count}))
                unit.steps = [steps.get(p.key, 0) for p in unit.parameters]
        except ValueError as error:
            raise ValueError(f"the checkpoint {printable(str(self.path))} cannot be loaded: {error}") from error
        except Exception as error:
            why = str(error) or repr(error)  # a MemoryError has no message
            raise CheckpointError(f"the checkpoint {self.path} cannot be loaded: {why}") from error

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
        part, stored = unit.elementwise, {} if self.files is None else self.files.tensors
        for number, shard in enumerate(part.shards):
            for moment in sorted(part.needs[shard.group, shard.method]) if shard.key in stepped else ():
                view, kind = part.views[moment][number], f"elementwise/{moment}"
                box = Box((shard.elements.start,), (view.numel(),))
                same = stored.get((names[shard.key], kind), (view.dtype,))[0] == view.dtype
                take = view.copy_ if same else partial(part.load, moment, number, slice(None))
                yield Wanted(Place(names[shard.key], kind, box), take)
        yield from self._wanted_buffers(unit, names)

    def _wanted_blocks(self, stack: BlockStack, names: Mapping[str, str], stepped: set[str]) -> Iterable[Wanted]:
        # By options, as blocks of other groups may have joined: the layout, and whether rows hold just what is stored.
        layouts: dict[str, tuple[BlockLayout, bool]] = {}
        for row, key in enumerate(stack.keys):
            parameter, _, index = key.rpartition("/")
            if parameter in stepped:
                options = self.manifest.parameters[names[parameter]]["options"]
                if options not in layouts:
                    layout = self._layout(options, stack, key)
                    layouts[options] = layout, _is_in_rows(stack, layout)
                place, (layout, same) = Place(names[parameter], int(index)), layouts[options]
                if same:
                    yield Wanted(place, partial(_note, stack, row), _memory(stack, row, layout))
                else:
                    yield Wanted(place, partial(_fill, stack, row, layout))

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
        stored = {name: tuple(tensor.shape[1:]) for name, tensor in stack.tensors.items()}
        if {name: tuple(shape) for name, _, shape in layout[:-1]} == stored:
            return layout
        saved, here = shapes_in(layout), {name: form.shape for name, form in stack.forms.items()}
        if saved != here:  # not only the formats differ
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
                yield kind, shape, read_one(self.files, Place(name, kind, whole(shape)))

    def _add_blocks(self, stacks: dict[str, _Rows], name: str, key: str) -> None:
        record = self.manifest.parameters[name]
        assert self.files is not None
        for index, block in enumerate(cut_into_blocks(record["merged"], record["cuts"]) if record["blocks"] else []):
            options = layout_key(record["options"], block.lengths)
            layout = self.manifest.layouts[options]
            parts = whole_tensors(read_one(self.files, Place(name, index)), layout)
            tensors = dict(zip((part[0] for part in layout), parts, strict=True))
            rows = stacks.setdefault(options, _Rows(list(block.lengths)))
            rows.keys.append(f"{key}/{index}")
            rows.status.append(read_status(tensors.pop("status").tolist()))
            rows.tensors.append(tensors)

    def items(self) -> Iterable[Item]:
        """All state that no unit has read yet, to be written again unchanged; the same on all ranks."""
        if self.files is None:
            return
        for place, form in self.files.items():
            if base_key(place.parameter) in self.keys:
                yield Item(place, form, partial(read_one, self.files, place))


def read(files: TensorFiles, wanted: Iterable[Wanted]) -> None:
    """Read blocks and boxes, and give each of them away as soon as it is verified.

    Raises:
        CheckpointError: if something is missing, cannot be read, or is not as it was saved.
    """
    asked = list(wanted)
    sizes = [_bytes(files, want.place) for want in asked]
    total = sum(sizes)
    with progress("loading", total, mebibytes) if total >= LARGE else UNSHOWN as advance:
        for want, size in zip(asked, sizes, strict=True):
            want.take(read_one(files, want.place, want.memory))
            advance(size)


def read_one(files: TensorFiles, place: Place, memory: Sequence[Tensor | None] | None = None) -> Any:
    """A block's stored tensors, in ``memory`` if it is given, or any box of a stored tensor, on the CPU."""
    if place.box is None:
        rank, stored = _block(files, place)
        where = [None] * len(stored.form) if memory is None else memory
        parts = enumerate(zip(stored.form, where, strict=True))
        return [files.values(rank, stored, n, 0, size_of(form), own).view(form[2]) for n, (form, own) in parts]
    dtype, _, boxes = _tensor(files, place)
    out, filled = torch.zeros(place.box.lengths, dtype=dtype, device="cpu"), 0
    for rank, stored in boxes:
        assert stored.place.box is not None
        common = _common(stored.place.box, place.box)
        for box, values in [] if common is None else _rows(files, rank, stored, common):
            _part(out, place.box, box).copy_(values)
            filled += values.numel()
    if filled != out.numel():
        raise CheckpointError(f"the checkpoint holds {filled} of the {out.numel()} elements of {printable(str(place))}")
    return out


def _rows(files: TensorFiles, rank: int, stored: Stored, wanted: Box) -> Iterator[tuple[Box, Tensor]]:
    """The values of a box within a stored one, a few rows at a time."""
    dtype, outer = stored.form[0][1], stored.place.box
    assert outer is not None
    if not outer.lengths:
        yield wanted, files.values(rank, stored, 0, 0, dtype.itemsize).view(())
        return
    row = math.prod(outer.lengths[1:]) * dtype.itemsize
    step = max(1, SLAB // row)
    end = wanted.offsets[0] + wanted.lengths[0]
    for first in range(wanted.offsets[0], end, step):
        rows = min(step, end - first)
        start = (first - outer.offsets[0]) * row
        values = files.values(rank, stored, 0, start, start + rows * row).view(rows, *outer.lengths[1:])
        box = Box((first, *wanted.offsets[1:]), (rows, *wanted.lengths[1:]))
        yield box, _part(values, Box((first, *outer.offsets[1:]), (rows, *outer.lengths[1:])), box)


def _bytes(files: TensorFiles, place: Place) -> int:
    if place.box is None:
        return _block(files, place)[1].size
    return math.prod(place.box.lengths) * _tensor(files, place)[0].itemsize


def _block(files: TensorFiles, place: Place) -> tuple[int, Stored]:
    found = files.blocks.get((place.parameter, int(place.part)))
    if found is None:
        raise CheckpointError(f"the checkpoint does not hold {printable(str(place))}")
    return found


def _tensor(files: TensorFiles, place: Place) -> tuple[torch.dtype, tuple[int, ...], list[tuple[int, Stored]]]:
    found = files.tensors.get((place.parameter, str(place.part)))
    if found is None:
        raise CheckpointError(f"the checkpoint does not hold {printable(str(place))}")
    return found


def _part(tensor: Tensor, outer: Box, box: Box) -> Tensor:
    """The view of a box in the tensor of a larger one."""
    for dim, (outer_start, start, length) in enumerate(zip(outer.offsets, box.offsets, box.lengths, strict=True)):
        tensor = tensor.narrow(dim, start - outer_start, length)
    return tensor


def _common(one: Box, other: Box) -> Box | None:
    """As `Box.intersect`, in this file because it is called for every box."""
    found = []
    for a, n, b, m in zip(one.offsets, one.lengths, other.offsets, other.lengths, strict=True):
        found.append((max(a, b), min(a + n, b + m)))
    if any(start >= stop for start, stop in found):
        return None
    return Box(tuple(start for start, _ in found), tuple(stop - start for start, stop in found))


def _is_in_rows(stack: BlockStack, layout: BlockLayout) -> bool:
    """Whether rows of a live stack on the CPU have the bytes that are stored of a block."""
    here = {name: (str(tensor.dtype), tuple(tensor.shape[1:])) for name, tensor in stack.tensors.items()}
    on_cpu = all(tensor.device.type == "cpu" for tensor in stack.tensors.values())
    return on_cpu and {name: (f"torch.{kind}", tuple(shape)) for name, kind, shape in layout[:-1]} == here


def _memory(stack: BlockStack, row: int, layout: BlockLayout) -> list[Tensor | None]:
    """The bytes of a row of a live stack for each stored tensor; none for the status."""
    rows = [stack.tensors[name][row] for name, _, _ in layout[:-1]]
    return [*(tensor.reshape(-1).view(torch.uint8) for tensor in rows), None]


def _fill(stack: BlockStack, row: int, layout: BlockLayout, parts: Sequence[Tensor]) -> None:
    """Load a stored block's tensors into a row, still without state, of a live stack."""
    if any(kind.endswith(TRIANGLE) for _, kind, _ in layout):
        parts = whole_tensors(parts, layout)
    state = {name: part for (name, _, _), part in zip(layout, parts, strict=True)}
    stack.load_row(row, state, *read_status(state.pop("status").tolist()))


def _note(stack: BlockStack, row: int, parts: Sequence[Tensor]) -> None:
    """Note the status, the last part, of a stored block that was read into the memory of its row."""
    stack.row_is_loaded(row, *read_status(parts[-1].tolist()))


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
