"""A rank's part of a checkpoint's manifest: what is told of its parameters, groups and block layouts, in builtins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from shampoo_deepspeed.checkpoint.manifest import layout_key
from shampoo_deepspeed.checkpoint.stored_state import StoredState, base_key, stored_name
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import Policy
from shampoo_deepspeed.options.rules import STRIDE
from shampoo_deepspeed.state.block_codec import BlockLayout, Form, block_layout, dtype_name
from shampoo_deepspeed.state.state_dict import SavedState, parameter_of
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer


def tables(optimizer: BlockOptimizer, form: Form) -> dict[str, Any]:
    """This rank's part of the manifest, in builtins; what several know the first rank of a unit tells."""
    waiting, configs = optimizer.waiting_state, optimizer.configs()
    known = {entry.parameter.key: entry.parameter for entry in optimizer.entries}
    policies = optimizer.policies
    numbers: dict[str, int | str] = {key: policies[key].options for key in known}
    steps = dict(waiting.steps) if waiting is not None else {}
    parameters: dict[str, dict[str, Any]] = {
        stored_name(key, None): _record(p, steps.get(key, 0), policies[key], numbers[key]) for key, p in known.items()
    }
    layouts: dict[str, BlockLayout] = {}
    if isinstance(waiting, StoredState):
        records, as_stored = _tables_of_waiting(waiting, known)
        parameters |= records
        layouts |= as_stored
    elif waiting is not None:
        layouts |= _layouts(waiting.everything(), numbers, form)
    for unit in optimizer.units:
        if unit.dtype != torch.float32:  # the blocks' bytes are others
            numbers |= {p.key: f"{numbers[p.key]} in {dtype_name(unit.dtype)}" for p in unit.parameters}
        for parameter, count in zip(unit.parameters, unit.steps, strict=True):
            parameters.pop(stored_name(parameter.key, None), None)
            if unit.rank:
                continue
            name = stored_name(parameter.key, unit.layout.part)
            parameters[name] = _record(parameter, count, policies[parameter.key], numbers[parameter.key])
            if unit.layout.part is not None:
                parameters[name]["parts"] = unit.layout.parts
        layouts |= _layouts(SavedState.of_units([unit], 0), numbers, form)
    # The rate is read from the group at every step and is not part of what is kept of its options. A framework may have
    # taken out groups that have no parameters.
    live = {group["shampoo_group"]: {"lr": float(group["lr"])} for group in optimizer.param_groups}
    own = {number: config for number, config in configs.items() if number < STRIDE}
    groups = {str(number): {**config.to_json(), **live.get(number, {})} for number, config in own.items()}
    return {
        "parameters": parameters,
        "layouts": layouts,
        "groups": groups,
        "rejected_steps": optimizer.rejected_steps,
    }


def _tables_of_waiting(
    waiting: StoredState, known: Mapping[str, Parameter]
) -> tuple[dict[str, dict[str, Any]], dict[str, BlockLayout]]:
    """Records and layouts of what is written again as it was stored, whatever the groups and dtypes of today's save."""
    directory = waiting.manifest.directory
    records: dict[str, dict[str, Any]] = {}
    layouts: dict[str, BlockLayout] = {}
    for name, record in waiting.manifest.parameters.items():
        key = base_key(name)
        if key in waiting.keys:
            records[name] = {**record, "group": known[key].group, "options": _of_save(record["options"], directory)}
    used = {str(record["options"]) for record in records.values()}
    for key, layout in waiting.manifest.layouts.items():
        options, _, shape = key.rpartition(":")
        if _of_save(options, directory) in used:
            layouts[f"{_of_save(options, directory)}:{shape}"] = layout
    return records, layouts


def _of_save(options: int | str, directory: str) -> str:
    """The number of options in layout keys, for blocks that an earlier save has written."""
    return str(options) if " of " in str(options) else f"{options} of {directory}"


def _record(parameter: Parameter, steps: int, policy: Policy, options: int | str) -> dict[str, Any]:
    blocks = policy.preconditioned
    return {
        "shape": list(parameter.shape),
        "group": parameter.group,
        "options": options,
        "steps": steps,
        "merged": list(policy.merged) if blocks else None,
        "cuts": cuts_of(policy),
        "decays": policy.decays,
    }


def cuts_of(policy: Policy) -> list[list[int]] | None:
    """Lengths of blocks in builtins, None where there are none."""
    return [list(along) for along in policy.cuts] if policy.preconditioned else None


def _layouts(state: SavedState, numbers: Mapping[str, int | str], form: Form) -> dict[str, BlockLayout]:
    out = {}
    for stack in state.stacks:
        for number in {numbers[parameter_of(key)] for key in stack["keys"]}:
            out[layout_key(number, stack["shape"])] = block_layout(stack, form)
    return out
