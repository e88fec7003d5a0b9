"""State dicts: live units to builtins and tensors, and saved state back to whoever owns it now."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.unit import Unit

FORMAT = 1


@dataclass
class SavedState:
    """The ``"shampoo"`` part of a state dict: lists of exported stacks, element-wise parts and momentum buffers."""

    stacks: list[dict[str, Any]]
    elementwise: list[dict[str, Any]]
    momenta: list[dict[str, Any]]
    rejected_steps: int = 0

    @classmethod
    def of_units(cls, units: Sequence[Unit], rejected_steps: int) -> SavedState:
        """This rank's state; tensors are the live ones."""
        saved = cls([], [], [], rejected_steps)
        for unit in units:
            keys = [p.key for p in unit.parameters]
            saved.stacks += [stack.export() for stack in unit.stacks]
            saved.elementwise.append(unit.elementwise.export(keys))
            saved.momenta += [_momentum(unit, tensor, buffer, keys) for tensor, buffer in unit.momenta.items()]
        return saved

    @classmethod
    def parse(cls, state_dict: Mapping[str, Any]) -> SavedState:
        """Take a state dict apart.

        Raises:
            ValueError: where it has no Shampoo state, or one of another format.
        """
        found = state_dict.get("shampoo")
        if not isinstance(found, Mapping):
            raise ValueError("this state dict has no 'shampoo' entry: it was not saved by Shampoo")
        if found.get("format") != FORMAT:
            raise ValueError(
                f"Shampoo state format {found.get('format')!r} is unknown here; this version reads {FORMAT}"
            )
        stacks, elementwise, momenta = (list(found[name]) for name in ("stacks", "elementwise", "momenta"))
        return cls(stacks, elementwise, momenta, int(found["rejected_steps"]))

    def to_dict(self) -> dict[str, Any]:
        """Builtins and tensors; ``parse`` reads them back."""
        parts = {"stacks": self.stacks, "elementwise": self.elementwise, "momenta": self.momenta}
        return {"format": FORMAT, "rejected_steps": self.rejected_steps, **parts}

    def joined(self, others: Sequence[SavedState]) -> SavedState:
        """This state and those of other ranks (or of parameters without a step so far) as one; copies count once."""
        everything = [self, *others]
        elementwise: dict[str, dict[str, Any]] = {}
        momenta: dict[str, dict[str, Any]] = {}
        for part in (part for s in everything for part in s.elementwise):
            elementwise.setdefault(str((part["segments"], sorted(part["steps"]))), part)
        for buffer in (buffer for s in everything for buffer in s.momenta):
            momenta.setdefault(str(buffer["shards"]), buffer)
        stacks = [stack for s in everything for stack in s.stacks]
        return SavedState(stacks, list(elementwise.values()), list(momenta.values()), self.rejected_steps)

    def without(self, keys: set[str]) -> SavedState | None:
        """What is left when the parameters ``keys`` are taken out; None where nothing is."""
        stacks = []
        for stack in self.stacks:
            kept = [row for row, key in enumerate(stack["keys"]) if parameter_of(key) not in keys]
            if kept:
                rows = {name: [stack[name][row] for row in kept] for name in ("keys", "steps", "refreshed", "failures")}
                tensors = {name: t[torch.tensor(kept, device=t.device)] for name, t in stack["tensors"].items()}
                stacks.append({**stack, **rows, "tensors": tensors})
        left = SavedState(
            stacks,
            [part for whole in self.elementwise if (part := _elementwise_without(whole, keys))["steps"]],
            [m for m in self.momenta if not {shard[0] for shard in m["shards"]} <= keys],
            self.rejected_steps,
        )
        return left if left.stacks or left.elementwise or left.momenta else None

    def parameter_keys(self) -> set[str]:
        """The keys of all parameters that have state here."""
        keys = {parameter_of(key) for stack in self.stacks for key in stack["keys"]}
        return keys.union(*(part["steps"] for part in self.elementwise))

    def check(self, unit: Unit) -> None:
        """Whether the state fits a unit's parameters, by their shapes and blocks.

        Raises:
            ValueError: naming the first parameter that has other blocks or another size, or only some of its blocks.
        """
        shapes = {unit.block_key(n): block.box.lengths for n, block in enumerate(unit.plan.blocks)}
        own = {p.key: p.shape for p in unit.parameters}
        whole = {p.key for p, t in zip(unit.parameters, unit.treatments, strict=True) if not t.preconditioned}
        saved = {key: tuple(stack["shape"]) for stack in self.stacks for key in stack["keys"]}
        known = {parameter_of(key) for key in saved}
        for key, shape in saved.items():
            if parameter_of(key) in own and shapes.get(key) != shape:
                raise ValueError(
                    f"the saved state has block {key} of shape {shape}, which the parameter of shape "
                    f"{own[parameter_of(key)]} does not have here; its shape, max_preconditioner_dim or exclude differ"
                )
        for key in (key for stack in unit.stacks for key in stack.keys):
            if key not in saved and parameter_of(key) in known:
                raise ValueError(f"the saved state has other blocks of {parameter_of(key)!r}, but not {key!r}")
        for key, start, numel in (segment for part in self.elementwise for segment in part["segments"]):
            if key in own and (key not in whole or start + numel > math.prod(own[key])):
                raise ValueError(
                    f"the saved state has element-wise state of {key!r} up to element {start + numel}, but here it "
                    f"is {'element-wise' if key in whole else 'preconditioned'} with shape {own[key]}"
                )

        self._check_segments(unit)

    def _check_segments(self, unit: Unit) -> None:
        held: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for key, start, numel in (segment for part in self.elementwise for segment in part["segments"]):
            held[key].append((start, start + numel))
        for s in unit.elementwise.segments:
            overlaps = [min(stop, s.start + s.numel) - max(start, s.start) for start, stop in held.get(s.key, [])]
            filled = sum(n for n in overlaps if n > 0)
            if s.key in held and filled != s.numel:
                raise ValueError(
                    f"the saved state holds {filled} of the {s.numel} elements of {s.key} that this rank needs; its "
                    "shape is another, or it was saved with another sharding"
                )

    def load(self, unit: Unit) -> None:
        """Hand a unit its state. Parameters that the state does not know at all start anew.

        Raises:
            ValueError: where a parameter's state is there in part only, or does not fit the options.
        """
        self.check(unit)
        rows = {key: (stack, row) for stack in self.stacks for row, key in enumerate(stack["keys"])}
        for stack in unit.stacks:
            for row, key in enumerate(stack.keys):
                if key in rows:
                    stack.load_row(row, *rows[key])
        unit.elementwise.load(self.elementwise, [p.key for p in unit.parameters])
        self._load_momenta(unit)

    def _load_momenta(self, unit: Unit) -> None:
        pieces = {}
        for saved in self.momenta:
            for key, offsets, lengths, offset in saved["shards"]:
                pieces[key, tuple(offsets), tuple(lengths)] = (saved["buffer"], offset)
        for shard in unit.layout.shards:
            found = pieces.get((unit.parameters[shard.parameter].key, shard.box.offsets, shard.box.lengths))
            if found is not None:
                buffer, offset = found
                target = unit.momentum_buffer(shard.tensor).narrow(0, shard.offset, shard.box.numel)
                target.copy_(buffer.narrow(0, offset, shard.box.numel))


def parameter_of(block_key: str) -> str:
    """The parameter's key within a block key, ``"parameter/index"``."""
    return block_key.rsplit("/", 1)[0]


def _elementwise_without(part: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    """An exported element-wise part without the parameters ``keys``."""
    if keys.isdisjoint(part["steps"]):
        return dict(part)
    kept = [number for number, segment in enumerate(part["segments"]) if segment[0] not in keys]
    sizes = [numel for _, _, numel in part["segments"]]
    tensors = {}
    for name, tensor in part["tensors"].items():
        pieces = torch.split(tensor, sizes)
        tensors[name] = torch.cat([pieces[n] for n in kept]) if kept else tensor.new_empty(0)
    steps = {key: step for key, step in part["steps"].items() if key not in keys}
    return {"steps": steps, "segments": [part["segments"][n] for n in kept], "tensors": tensors}


def _momentum(unit: Unit, tensor: int, buffer: Tensor, keys: Sequence[str]) -> dict[str, Any]:
    shards = [
        [keys[s.parameter], list(s.box.offsets), list(s.box.lengths), s.offset]
        for s in unit.layout.shards
        if s.tensor == tensor
    ]
    return {"shards": shards, "buffer": buffer}
