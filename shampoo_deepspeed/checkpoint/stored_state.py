"""State on disk: what units hold as items to write, and a checkpoint as the source of today's units.

Keys of the stored tensors:
``blocks/<parameter>/<index>`` a block's state as bytes, in the order of its layout (uint8, 1-D);
``elementwise/<parameter>/<moment>`` moments of an unpreconditioned parameter (1-D, its flattened shape);
``shards/<parameter>/<kind>`` momentum and master weights (the parameter's shape).
The last two are written and read in boxes, so every sharding can read what any other has written.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.checkpoint.manifest import Manifest, layout_key
from shampoo_deepspeed.checkpoint.tensor_store import Item, StorageError, Store, Wanted
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.geometry.boxes import Box, Placed, row_major
from shampoo_deepspeed.state.block_codec import (
    BlockLayout,
    Form,
    block_layout,
    block_size,
    cut,
    packed,
    read_status,
    unpack,
)
from shampoo_deepspeed.state.state_dict import SavedState, gathered_from_unit, view_of

_NUMBERED = re.compile(r"(.+)@[0-9]*", re.DOTALL)


def stored_name(key: str, part: int | None) -> str:
    """A parameter's key in checkpoints: with expert parallelism, ranks hold different ones under the same name.

    A key that looks like that of a part gets an "@" of its own.
    """
    if part is None:
        return f"{key}@" if _NUMBERED.fullmatch(key) else key
    return f"{key}@{part}"


def state_items(
    state: SavedState, shapes: Mapping[str, tuple[int, ...]], part: int | None, form: Form
) -> Iterable[Item]:
    """What a rank's state in memory gives to write.

    Args:
        shapes: of the parameters, by key.
        part: that of the unit's layout.
        form: on disk.
    """
    for stack in state.stacks:
        layout = block_layout(stack, form)
        size = block_size(layout)
        for row, key in enumerate(stack["keys"]):
            parameter, _, index = key.rpartition("/")
            name = f"blocks/{stored_name(parameter, part)}/{index}"
            yield Item(name, (size,), Box((0,), (size,)), torch.uint8, partial(packed, stack, row, layout))
    for exported in state.elementwise:
        position = 0
        for key, start, numel in exported["segments"]:
            for moment, tensor in sorted(exported["tensors"].items()):
                dtype, values = form.dtype(moment, tensor), tensor.narrow(0, position, numel)
                name = f"elementwise/{stored_name(key, part)}/{moment}"
                yield Item(name, (math.prod(shapes[key]),), Box((start,), (numel,)), dtype, partial(values.to, dtype))
            position += numel
    for found in state.buffers:
        dtype = form.dtype(found["kind"], found["buffer"])
        for key, offsets, lengths, offset in found["shards"]:
            box = Box(tuple(offsets), tuple(lengths))
            view = view_of(found["buffer"], Placed(box, offset, row_major(lengths)))
            yield Item(
                f"shards/{stored_name(key, part)}/{found['kind']}", shapes[key], box, dtype, partial(view.to, dtype)
            )


@dataclass(frozen=True)
class StoredState:
    """A checkpoint as a `StateSource`: each unit reads what it owns today, when it is built.

    Args:
        path: the checkpoint.
        keys: parameters whose state is still to be handed out.
    """

    path: Path
    manifest: Manifest
    keys: frozenset[str]

    @cached_property
    def store(self) -> Store:
        """The tensors."""
        return Store(self.path / self.manifest.directory)

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
        """Whether any state is still to be handed out; otherwise the files are needed no more."""
        records = self.manifest.parameters.items()
        return any(record["steps"] for name, record in records if base_key(name) in self.keys)

    def without(self, keys: set[str]) -> StoredState:
        """The same checkpoint with fewer parameters to hand out."""
        return replace(self, keys=self.keys - keys)

    def restore_into(self, unit: StepUnit) -> None:
        """Read a unit's state from the files.

        Raises:
            ValueError: on all ranks of the unit, where a file cannot be read or a block has another layout.
        """
        problem = None
        try:
            self.store.read(self._wanted(unit))
            for p, parameter in enumerate(unit.parameters):
                if parameter.key in self.keys:
                    unit.steps[p] = int(self._record(unit, parameter.key)["steps"])
        except Exception as error:  # whatever it is, the other ranks wait for this one's word
            problem = str(error) if isinstance(error, StorageError) else repr(error)
        found = next((p for p in gathered_from_unit(problem, unit) if p), None)
        if found:
            raise ValueError(f"the checkpoint {self.path} cannot be loaded: {found}")

    def _record(self, unit: StepUnit, key: str) -> Mapping[str, Any]:
        name = stored_name(key, unit.layout.part)
        if name not in self.manifest.parameters:
            raise StorageError(f"it was saved with another number of expert-parallel ranks: {name!r} is not in it")
        record = self.manifest.parameters[name]
        # Equal names are other experts then.
        if record.get("parts", unit.layout.parts) != unit.layout.parts:
            raise StorageError(
                f"it was saved with {record['parts']} expert-parallel ranks, and here are {unit.layout.parts}: "
                f"{name!r} is of other experts"
            )
        return record

    def _wanted(self, unit: StepUnit) -> Iterable[Wanted]:
        for stack in unit.stacks:
            for row, key in enumerate(stack.keys):
                parameter, _, index = key.rpartition("/")
                record = self._record(unit, parameter) if parameter in self.keys else None
                if record is not None and record["steps"]:
                    layout = self._layout(record, stack, key)
                    box = Box((0,), (block_size(layout),))
                    name = f"blocks/{stored_name(parameter, unit.layout.part)}/{index}"
                    yield Wanted(name, box, partial(unpack, stack, row, layout))
        stored = self.store.tensors()
        views, needs = unit.elementwise.views, unit.elementwise.needs
        for number, segment in enumerate(unit.elementwise.segments):
            key = segment.key
            if key in self.keys and self._record(unit, key)["steps"]:
                for moment in sorted(needs[segment.group, segment.method]):
                    box = Box((segment.start,), (segment.numel,))
                    target = views[moment][number]
                    yield Wanted(f"elementwise/{stored_name(key, unit.layout.part)}/{moment}", box, target.copy_)
        narrow = [tensor.dtype != unit.dtype for tensor in unit.local_tensors()]
        for shard in unit.layout.shards:
            for kind in unit.buffers:
                key = unit.parameters[shard.parameter].key
                name = f"shards/{stored_name(key, unit.layout.part)}/{kind}"
                # Where the framework keeps float32 weights itself there is nothing to do with a master.
                if key in self.keys and name in stored and (kind != "master" or narrow[shard.tensor]):
                    place = Placed(shard.box, shard.offset, row_major(shard.box.lengths))
                    yield Wanted(name, shard.box, view_of(unit.buffer(kind, shard.tensor), place).copy_)

    def _layout(self, record: Mapping[str, Any], stack: BlockStack, key: str) -> BlockLayout:
        layout = self.manifest.layouts.get(layout_key(record["options"], stack.shape))
        if layout is None:
            raise StorageError(f"it holds no blocks of shape {stack.shape}, as {key} has here")
        saved = {name: shape for name, _, shape in layout[:-1]}
        here = {name: tuple(tensor.shape[1:]) for name, tensor in stack.tensors.items()}
        if saved != here:
            raise StorageError(
                f"block {key} was saved with {sorted(saved.items())}, and here it has {sorted(here.items())}"
            )
        return layout

    def everything(self) -> SavedState:
        """Read all that is still to be handed out; of expert-parallel parts there may be none."""
        stacks: dict[str, dict[str, Any]] = {}
        elementwise, buffers = [], []
        for name, (shape, _, _) in sorted(self._left().items()):
            kind, key, last = _split(name)
            tensor = self.store.read_one(name, Box((0,) * len(shape), shape))
            if kind == "blocks":
                self._add_block(stacks, key, last, tensor)
            elif kind == "elementwise":
                elementwise.append({"segments": [[_without_mark(key), 0, tensor.numel()]], "tensors": {last: tensor}})
            else:
                shards = [[_without_mark(key), [0] * len(shape), list(shape), 0]]
                buffers.append({"kind": last, "shards": shards, "buffer": tensor.reshape(-1)})
        joined = [_stacked(stack) for stack in stacks.values()]
        return SavedState(self.steps, joined, _together(elementwise), buffers, self.rejected_steps)

    def _left(self) -> dict[str, tuple[tuple[int, ...], torch.dtype, list[Box]]]:
        if not self.has_left:
            return {}
        return {n: what for n, what in self.store.tensors().items() if base_key(_split(n)[1]) in self.keys}

    def _add_block(self, stacks: dict[str, dict[str, Any]], key: str, index: str, blob: Tensor) -> None:
        record = self.manifest.parameters[key]
        shape = cut_into_blocks(record["merged"], record["cuts"])[int(index)].lengths
        name = layout_key(record["options"], shape)
        layout = self.manifest.layouts[name]
        tensors = dict(zip((part[0] for part in layout), cut(blob, layout), strict=True))
        status = tensors.pop("status").tolist()
        stack = stacks.setdefault(name, {"keys": [], "shape": list(shape), "rows": []})
        stack["keys"].append(f"{_without_mark(key)}/{index}")
        stack["rows"].append((*read_status(status), tensors))

    def items(self) -> Iterable[Item]:
        """What is still to be handed out, to be written again as it is; all ranks offer the same."""
        for name, (shape, dtype, boxes) in self._left().items():
            for box in boxes:
                yield Item(name, shape, box, dtype, partial(self.store.read_one, name, box))


def base_key(name: str) -> str:
    """A parameter's key without the number of its expert-parallel part."""
    found = _NUMBERED.fullmatch(name)
    return found[1] if found else name


def _without_mark(name: str) -> str:
    """A stored name without the "@" of keys that look like those of parts."""
    return name.removesuffix("@")


def _split(name: str) -> tuple[str, str, str]:
    """Kind, parameter and last part of a stored tensor's name; parameters may have slashes in their names."""
    kind, _, rest = name.partition("/")
    key, _, last = rest.rpartition("/")
    return kind, key, last


def _stacked(stack: dict[str, Any]) -> dict[str, Any]:
    rows = stack["rows"]
    names = rows[0][3]
    return {
        "keys": stack["keys"],
        "shape": stack["shape"],
        "refreshed": [refreshed for refreshed, _, _, _ in rows],
        "failures": [failures for _, failures, _, _ in rows],
        "pending": [pending for _, _, pending, _ in rows],
        "tensors": {name: torch.stack([tensors[name] for _, _, _, tensors in rows]) for name in names},
    }


def _together(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One exported element-wise state per parameter, with all of its moments."""
    found: dict[str, dict[str, Any]] = defaultdict(lambda: {"segments": [], "tensors": {}})
    for part in parts:
        key = part["segments"][0][0]
        found[key]["segments"] = part["segments"]
        found[key]["tensors"] |= part["tensors"]
    return list(found.values())
