"""State as torch.distributed.checkpoint.state_dict carries it: tensors of each parameter under ``state``.

Of a state dict these helpers keep only this and the options. They gather DTensors or cut whole tensors as the current
ranks need them, by a template that must have the same keys on all ranks. So the entry of a parameter has:
``shampoo_blocks``, the bytes of its blocks in the order of their index (uint8, 1-D), cut over the parameter's mesh;
``exp_avg``, ``second_moment`` if it is element-wise, ``momentum``, ``master``, ``average``: sharded as it is;
``step``, ``shampoo_format`` and ``shampoo_rejected`` (the optimizer's count of rejected steps), 0-d;
what others keep in ``optimizer.state`` of the parameter, under its own name (see `shown_name`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shampoo_deepspeed.algorithm.elementwise import moments_of
from shampoo_deepspeed.distributed.collectives import all_gather_numbers, on_all_ranks
from shampoo_deepspeed.engine.step_unit import StepUnit, as_count
from shampoo_deepspeed.geometry.boxes import FlatRange
from shampoo_deepspeed.options.config import CONVERTED, OPTION_NAMES, ShampooConfig, options_with
from shampoo_deepspeed.options.param_groups import group_options
from shampoo_deepspeed.options.rules import expanded
from shampoo_deepspeed.state.dtensor_blocks import BlockBytes, as_sharded, bytes_here, local_part, on_cpu
from shampoo_deepspeed.state.state_dict import FORMAT, SavedState, lacking

logger = logging.getLogger("shampoo_deepspeed")

BLOCKS, MARK, EXTERNAL = "shampoo_blocks", "shampoo_format", "shampoo_external"
REJECTED = "shampoo_rejected"
NO_STATE = 1.0  # the value of EXTERNAL if the optimizer had no state
FLAT_SHARDS = (
    "torch's own checkpoint helpers cannot carry Shampoo's state of parameters that are flat shards (FSDP1, ZeRO); use "
    "save_shampoo(optimizer, path) and load_shampoo(optimizer, path) as well, and call torch's helpers within "
    "optimizer.with_external_state({...})"
)

# Names that this module gives to parts of our state.
OWN_NAMES = {"step", MARK, EXTERNAL, REJECTED, BLOCKS, "exp_avg", "second_moment", "momentum", "master", "average"}
# Precedes the names of others' values that could be mistaken for ours.
OTHERS = "other_"

Entry = dict[str, Any]


def shown_name(name: Any) -> Any:
    """The name in an entry of what others keep as ``name`` in ``optimizer.state``: never one of ours."""
    return f"{OTHERS}{name}" if name in OWN_NAMES or str(name).startswith(OTHERS) else name


def with_others(entry: Entry, kept: Mapping[Any, Any]) -> Entry:
    """An entry together with what others keep in ``optimizer.state`` of the same tensor."""
    return entry | {shown_name(name): value for name, value in kept.items() if name != "step"}


def others_in(entry: Mapping[Any, Any]) -> dict[Any, Any]:
    """What `with_others` has added to an entry."""
    found = {name: value for name, value in entry.items() if name not in OWN_NAMES}
    return {n.removeprefix(OTHERS) if isinstance(n, str) else n: value for n, value in found.items()}


def blank_entry() -> Entry:
    """The entry of a tensor that has taken no step and is not trained, so that others' values can be added."""
    return {"step": as_count(0), MARK: as_count(FORMAT)}


def external_entry(tensor: Tensor, step: Tensor, external: bool, shape: tuple[int, ...] = (1,)) -> Entry:
    """An entry that notes that the state is kept in another place, or that there is none yet.

    Args:
        shape: of the note. torch's helpers need at least one tensor that has dims.
    """
    note = torch.full(shape, 0.0 if external else NO_STATE, device=tensor.device)
    return {"step": step, MARK: as_count(FORMAT), EXTERNAL: note}


def unit_entries(
    unit: StepUnit, configs: Mapping[int, ShampooConfig], consolidated: SavedState | None, rejected_steps: int
) -> list[Entry]:
    """The entries of a unit's tensors, as copies on the CPU. A collective if they are DTensors.

    Args:
        consolidated: for replicas, the state of all of them, on the first one.

    Raises:
        RuntimeError: if torch's helpers cannot carry the state.
    """
    blocks = BlockBytes(unit)
    rows = consolidated.rows() if consolidated is not None else blocks.own_rows()
    entries = []
    for number, tensor in enumerate(unit.tensors):
        if unit.layout.homes != list(range(len(unit.tensors))):
            raise RuntimeError(FLAT_SHARDS)
        entry = {"step": as_count(unit.steps[number]), MARK: as_count(FORMAT)}
        entry[REJECTED] = as_count(rejected_steps)
        flat_moments = _flat_moments(unit, number, configs)
        entry |= {name: on_cpu(as_sharded(tensor, flat)) for name, flat in flat_moments.items()}
        stored = blocks.collected(number, rows) if unit.policies[number].preconditioned else None
        entries.append(entry if stored is None else entry | {BLOCKS: on_cpu(stored)})
    return entries


def is_torch_state(state_dict: Mapping[str, Any]) -> bool:
    """Whether a state dict has entries of `unit_entries` or `external_entry`."""
    return any(MARK in entry for entry in _of_parameters(state_dict).values())


def others_state(state_dict: Mapping[str, Any]) -> dict[Any, dict[Any, Any]]:
    """What others keep in ``optimizer.state``, by the saved name or number of each tensor."""
    found = {place: others_in(entry) for place, entry in _of_parameters(state_dict).items()}
    return {place: kept for place, kept in found.items() if kept}


def robust_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group that `completed_group` can restore after torch's helpers have taken it apart."""
    return {**group, "rules": json.dumps(group["rules"])}


def completed_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter group as it was before torch's helpers, which turn tuples into lists and drop empty ones."""
    defaults = group_options(ShampooConfig.from_saved({}))
    if isinstance(group.get("rules"), str):
        group = {**group, "rules": json.loads(group["rules"])}
    own = {n: tuple(v) if isinstance(v, list) and n in defaults else v for n, v in group.items()}
    return {n: () if isinstance(defaults[n], tuple) else defaults[n] for n in OPTION_NAMES} | own


def with_own_formats(group: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the formats of state of the group that it is loaded into, to which state is converted."""
    names = [name for name in options_with(CONVERTED) if group[name] != own[name]]
    if names:
        logger.warning(
            "the state was saved with %s; it is converted to the formats given here, %s",
            ", ".join(f"{name}={group[name]!r}" for name in names),
            ", ".join(f"{name}={own[name]!r}" for name in names),
        )
    return {**group, **{name: own[name] for name in names}}


@dataclass(frozen=True)
class TorchState:
    """Entries that torch's helpers have loaded, by parameter key, as a `StateSource`.

    Args:
        options: those of the save, by number, which tell the formats of the bytes of blocks.
    """

    entries: Mapping[str, Mapping[str, Tensor]]
    external: Mapping[str, Any] | None = None
    rejected_steps: int = 0
    options: Mapping[int, ShampooConfig] = field(default_factory=dict)

    @classmethod
    def parse(
        cls, state_dict: Mapping[str, Any], keys: Iterable[Sequence[str]], numbers: Sequence[int] = ()
    ) -> TorchState:
        """Parse a state dict.

        Args:
            keys: of the parameters in each parameter group.
            numbers: of these groups.

        Raises:
            ValueError: for another number of parameters, or another format.
        """
        state = _of_parameters(state_dict)
        notes = [float(entry[EXTERNAL]) for entry in state.values() if EXTERNAL in entry]
        if notes:
            return cls({}, None if notes[0] == NO_STATE else {"place": "the checkpoint"})
        entries: dict[str, Mapping[str, Tensor]] = {}
        for group, names in zip(state_dict["param_groups"], keys, strict=True):
            if len(group["params"]) != len(names):
                raise ValueError(
                    f"a saved parameter group has {len(group['params'])} parameters, but here it has {len(names)}"
                )
            found = {n: state.get(p, {}) for n, p in zip(names, group["params"], strict=True)}
            own = {n: {k: v for k, v in entry.items() if k in OWN_NAMES} for n, entry in found.items()}
            entries |= {name: entry for name, entry in own.items() if entry}
        wrong = {int(entry[MARK]) if MARK in entry else None for entry in entries.values()} - {FORMAT}
        if wrong:
            raise ValueError(f"Shampoo state format {wrong.pop()!r} is unknown here; this version reads {FORMAT}")
        groups = zip(numbers, map(completed_group, state_dict["param_groups"]), strict=False)
        options = {n: ShampooConfig.from_saved({k: v for k, v in g.items() if k in OPTION_NAMES}) for n, g in groups}
        rejected = max((int(entry.get(REJECTED, 0)) for entry in entries.values()), default=0)
        return cls(entries, None, rejected, expanded(options))

    @property
    def steps(self) -> dict[str, int]:
        """Steps by parameter key."""
        return {key: int(entry["step"]) for key, entry in self.entries.items()}

    def without(self, keys: set[str]) -> TorchState:
        """The state of all parameters except ``keys``."""
        return replace(self, entries={key: entry for key, entry in self.entries.items() if key not in keys})

    def everything(self) -> SavedState:
        """An empty state: `BlockOptimizer.take_waiting` has put all that has taken steps into units."""
        left = sorted(key for key, count in self.steps.items() if count)
        if left:
            raise RuntimeError(f"the state of {left[0]!r} was loaded by torch's checkpoint helpers and is in no unit")
        return SavedState(rejected_steps=self.rejected_steps)

    def restore_into(self, unit: StepUnit) -> None:
        """Restore a unit's state; the bytes of blocks are sent to their current owners.

        Raises:
            ValueError: on all ranks alike, if the entries do not fit.
        """
        blocks = BlockBytes(unit, self.options)
        with on_all_ranks(unit.group, unit.device):
            self._check_fits(unit, blocks)
        mine = [bytes_here(self.entries.get(p.key, {}).get(BLOCKS)) for p in unit.parameters]
        numbers = all_gather_numbers([number for held in mine for number in held], unit.group, unit.device)
        everyone = [list(map(FlatRange, of_rank[::2], of_rank[1::2])) for of_rank in numbers]
        for number, parameter in enumerate(unit.parameters):
            entry = self.entries.get(parameter.key)
            if entry is None:
                continue
            unit.steps[number] = int(entry["step"])
            self._fill_moments(unit, number, entry)
            if unit.policies[number].preconditioned and unit.steps[number]:
                blocks.distribute(number, local_part(entry[BLOCKS]), [own[number] for own in everyone])

    def _check_fits(self, unit: StepUnit, blocks: BlockBytes) -> None:
        for number, parameter in enumerate(unit.parameters):
            entry = self.entries.get(parameter.key)
            if entry is not None and int(entry["step"]):
                self._check_entry(unit, number, entry, blocks)

    def _check_entry(self, unit: StepUnit, number: int, entry: Mapping[str, Tensor], blocks: BlockBytes) -> None:
        key, policy = unit.parameters[number].key, unit.policies[number]
        moments = unit.elementwise.needs.get((policy.options, policy.method), set())
        missing = sorted(({BLOCKS} if policy.preconditioned else moments) - set(entry))
        if missing:
            raise ValueError(f"the saved state of {key!r} lacks {missing}: {lacking(key + '/0')}")
        for name, value in entry.items():
            numel = local_part(value).numel()
            if name not in ("step", MARK, REJECTED, BLOCKS) and numel != unit.sizes[number]:
                raise ValueError(f"the saved {name} of {key!r} has {numel} elements here, not {unit.sizes[number]}")
        if policy.preconditioned and entry[BLOCKS].numel() != blocks.total(number):
            raise ValueError(
                f"the saved blocks of {key!r} have {entry[BLOCKS].numel()} bytes, but here they have "
                f"{blocks.total(number)}; {self._why(unit, policy.options)}"
            )

    def _why(self, unit: StepUnit, number: int) -> str:
        """What may explain that blocks have other bytes: the options that differ, with both values."""
        before, now = self.options.get(number), unit.configs[number]
        names = [] if before is None else [n for n in before.reshaped_by(now) if n not in options_with(CONVERTED)]
        if before is None or not names:
            return "its shape, max_preconditioner_dim, betas or grafting differ"
        both = (f"{name} was {before.in_force(name)!r} and is {now.in_force(name)!r} here" for name in names)
        return ", ".join(both)

    def _fill_moments(self, unit: StepUnit, number: int, entry: Mapping[str, Tensor]) -> None:
        part = unit.elementwise
        for place, shard in enumerate(part.shards):
            for name in part.needs[shard.group, shard.method] if shard.tensor == number else ():
                part.load(name, place, slice(None), local_part(entry[name]).reshape(-1)[slice(*shard.local)])
        for kind in unit.buffers:
            if kind in entry:
                unit.buffer(kind, number).copy_(local_part(entry[kind]).reshape(-1))


def _of_parameters(state_dict: Mapping[str, Any]) -> dict[Any, Mapping[Any, Any]]:
    """The entries of tensors in a state dict, which may have users' own entries of any type too."""
    places = {place for group in state_dict["param_groups"] for place in group["params"]}
    found = {place: entry for place, entry in state_dict.get("state", {}).items() if place in places}
    return {place: entry for place, entry in found.items() if isinstance(entry, Mapping)}


def _flat_moments(unit: StepUnit, number: int, configs: Mapping[int, ShampooConfig]) -> dict[str, Tensor]:
    """Moments of a tensor's element-wise parameter and its buffers, each as a flat copy of the local tensor's size."""
    config = configs[unit.layout.groups[number]]
    out: dict[str, Tensor] = {}
    if not unit.policies[number].preconditioned:
        own = configs[unit.policies[number].options]
        dtype = torch.bfloat16 if own.elementwise_format == "bfloat16" else unit.dtype
        for name in sorted(moments_of(own, unit.policies[number].method)):
            out[name] = torch.zeros(unit.sizes[number], dtype=dtype, device=unit.device)
            for shard, view in zip(unit.elementwise.shards, unit.elementwise.views.get(name, []), strict=False):
                if shard.tensor == number:
                    out[name][slice(*shard.local)].copy_(view)
    narrow = unit.layout.local(unit.tensors[number]).dtype != unit.dtype
    used = {"momentum": config.momentum != 0.0, "master": narrow and config.master_weights}
    out |= {kind: unit.buffer(kind, number).clone() for kind in sorted(used) if used[kind]}
    if config.ema_decay:
        average = unit.buffers["average"].get(number)
        # Before the first step it is the weights; a template must have it too.
        value = unit.layout.local(unit.tensors[number]).to(unit.dtype).reshape(-1) if average is None else average
        out["average"] = value.clone()
    return out
