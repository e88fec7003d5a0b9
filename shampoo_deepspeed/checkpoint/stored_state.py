"""A checkpoint on disk as the source of the units' state.

Keys of the stored tensors:
``blocks/<parameter>/<index>`` a block's state as bytes, in the order of its layout (uint8, 1-D);
``elementwise/<parameter>/<moment>`` moments of an unpreconditioned parameter (1-D, its flattened shape);
``shards/<parameter>/<kind>`` momentum and master weights (the parameter's shape).
The last two are written and read in boxes, so every sharding can read what any other has written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.checkpoint.manifest import Manifest, base_key, layout_key, stored_name
from shampoo_deepspeed.checkpoint.tensor_store import Item, StorageError, Store, Wanted
from shampoo_deepspeed.distributed.collectives import on_all_ranks
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.state.block_codec import BlockLayout, block_size, cut, read_status, unpack
from shampoo_deepspeed.state.state_dict import BufferState, ElementwiseState, SavedState, StackState, view_of


@dataclass(frozen=True)
class StoredState:
    """A checkpoint as a `StateSource`: each unit reads what it owns when it is built.

    Args:
        path: the checkpoint.
        keys: parameters whose state no unit has read yet.
    """

    path: Path
    manifest: Manifest
    keys: frozenset[str]

    @cached_property
    def store(self) -> Store:
        """The tensors."""
        return Store(self.path / self.manifest.directory)

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

    @property
    def has_left(self) -> bool:
        """Whether any state has not been read yet; if not, the files are no longer needed."""
        records = self.manifest.parameters.items()
        return any(record["steps"] for name, record in records if base_key(name) in self.keys)

    def without(self, keys: set[str]) -> StoredState:
        """The same checkpoint for all parameters except ``keys``."""
        return replace(self, keys=self.keys - keys)

    def restore_into(self, unit: StepUnit) -> None:
        """Read a unit's state from the files.

        Raises:
            ValueError: on all ranks of the unit, if a file cannot be read or a block has another layout.
        """
        try:
            with on_all_ranks(unit.group, unit.device):
                names = {p.key: stored_name(p.key, unit.layout.part) for p in unit.parameters if p.key in self.keys}
                steps = {key: self._steps(name, unit.layout.parts) for key, name in names.items()}
                self.store.read(self._wanted(unit, names, {key for key, count in steps.items() if count}))
                unit.steps = [steps.get(p.key, 0) for p in unit.parameters]
        except Exception as error:
            raise ValueError(f"the checkpoint {self.path} cannot be loaded: {error}") from error

    def _steps(self, name: str, parts: int) -> int:
        """How many steps a parameter had taken.

        Raises:
            StorageError: if it is missing, or if its name stands for other experts than in a unit with these ``parts``.
        """
        record = self.manifest.parameters.get(name)
        if record is None:
            raise StorageError(f"it was saved with another number of expert-parallel ranks: {name!r} is not in it")
        if record.get("parts", parts) != parts:
            raise StorageError(
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
                yield Wanted(f"elementwise/{names[shard.key]}/{moment}", box, view.copy_)
        yield from self._wanted_buffers(unit, names)

    def _wanted_blocks(self, stack: BlockStack, names: Mapping[str, str], stepped: set[str]) -> Iterable[Wanted]:
        layouts: dict[int | str, tuple[BlockLayout, Box]] = {}  # by options, as blocks of other groups may have joined
        for row, key in enumerate(stack.keys):
            parameter, _, index = key.rpartition("/")
            if parameter in stepped:
                options = self.manifest.parameters[names[parameter]]["options"]
                if options not in layouts:
                    layout = self._layout(options, stack, key)
                    layouts[options] = layout, Box((0,), (block_size(layout),))
                layout, box = layouts[options]
                yield Wanted(f"blocks/{names[parameter]}/{index}", box, partial(unpack, stack, row, layout))

    def _wanted_buffers(self, unit: StepUnit, names: Mapping[str, str]) -> Iterable[Wanted]:
        stored = self.store.tensors()
        narrow = [tensor.dtype != unit.dtype for tensor in unit.local_tensors()]
        for shard in unit.layout.shards:
            name = names.get(unit.parameters[shard.parameter].key)
            for kind in unit.buffers if name is not None else ():
                # If the framework keeps float32 weights itself, a stored master is not needed.
                if f"shards/{name}/{kind}" in stored and (kind != "master" or narrow[shard.tensor]):
                    target = view_of(unit.buffer(kind, shard.tensor), shard.placed)
                    yield Wanted(f"shards/{name}/{kind}", shard.box, target.copy_)

    def _layout(self, options: int | str, stack: BlockStack, key: str) -> BlockLayout:
        """The layout of stored blocks under these options, for a live stack; ``key`` is that of one of them.

        Raises:
            StorageError: if they do not fit the stack.
        """
        layout = self.manifest.layouts.get(layout_key(options, stack.shape))
        if layout is None:
            raise StorageError(f"it holds no blocks of shape {stack.shape}, which {key} has here")
        saved = {name: shape for name, _, shape in layout[:-1]}
        here = {name: tuple(tensor.shape[1:]) for name, tensor in stack.tensors.items()}
        if saved != here:
            raise StorageError(
                f"block {key} was saved with {sorted(saved.items())}, but here it has {sorted(here.items())}"
            )
        return layout

    def everything(self) -> SavedState:
        """Read all state that no unit has read yet, which must not have expert-parallel parts."""
        stacks: dict[str, _Rows] = {}
        elementwise: dict[str, ElementwiseState] = {}
        buffers = []
        for name, (shape, _, _) in sorted(self._left().items()):
            kind, stored, last = _split(name)
            key = stored.removesuffix("@")  # for keys that look like those of parts
            tensor = self.store.read_one(name, Box((0,) * len(shape), shape))
            if kind == "blocks":
                self._add_block(stacks, stored, f"{key}/{last}", tensor)
            elif kind == "elementwise":
                found = elementwise.setdefault(key, ElementwiseState([[key, 0, tensor.numel()]], {}))
                found.tensors[last] = tensor
            else:
                buffers.append(BufferState(last, [[key, [0] * len(shape), list(shape), 0]], tensor.reshape(-1)))
        joined = [rows.stacked() for rows in stacks.values()]
        return SavedState(self.steps, joined, list(elementwise.values()), buffers, self.rejected_steps)

    def _left(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]]:
        if not self.has_left:
            return {}
        return {n: what for n, what in self.store.tensors().items() if base_key(_split(n)[1]) in self.keys}

    def _add_block(self, stacks: dict[str, _Rows], stored: str, block_key: str, blob: Tensor) -> None:
        record, index = self.manifest.parameters[stored], int(block_key.rpartition("/")[2])
        shape = cut_into_blocks(record["merged"], record["cuts"])[index].lengths
        name = layout_key(record["options"], shape)
        layout = self.manifest.layouts[name]
        tensors = dict(zip((part[0] for part in layout), cut(blob, layout), strict=True))
        rows = stacks.setdefault(name, _Rows(list(shape)))
        rows.keys.append(block_key)
        rows.status.append(read_status(tensors.pop("status").tolist()))
        rows.tensors.append(tensors)

    def items(self) -> Iterable[Item]:
        """All state that no unit has read yet, to be written again unchanged; the same on all ranks."""
        for name, (shape, dtype, boxes) in self._left().items():
            for box in boxes:
                yield Item(name, shape, box, dtype, partial(self.store.read_one, name, box))


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


def _split(name: str) -> tuple[str, str, str]:
    """Kind, stored name of the parameter, and last part of a stored tensor's key; parameters may have slashes."""
    kind, _, rest = name.partition("/")
    stored, _, last = rest.rpartition("/")
    return kind, stored, last
