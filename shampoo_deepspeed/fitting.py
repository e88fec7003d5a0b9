"""What of a checkpoint fits an optimizer, and why the rest does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shampoo_deepspeed.config import OPTION_NAMES, ShampooConfig
from shampoo_deepspeed.hosts import Parameter
from shampoo_deepspeed.manifest import Manifest
from shampoo_deepspeed.persistence import BlockOptimizer
from shampoo_deepspeed.record import cuts_of
from shampoo_deepspeed.stored import base_key
from shampoo_deepspeed.treatment import decays_under, treat
from shampoo_deepspeed.validators import OptionError

logger = logging.getLogger("shampoo_deepspeed")

# Options that say how and when ranks work, or which parameters are meant, not what their state looks like.
_NOT_STORED = (
    "communication_dtype",
    "apply_dtype",
    "bucket_mb",
    "overlap",
    "exclude",
    "no_decay",
    "refresh",
    "precondition_frequency",
)


def misfits(known: Sequence[Parameter], configs: Mapping[int, ShampooConfig], manifest: Manifest) -> dict[str, str]:
    """Why parameters of this rank cannot go on from a checkpoint, by key."""
    records: dict[str, Mapping[str, Any]] = {base_key(name): r for name, r in manifest.parameters.items()}
    out = {}
    for parameter in known:
        record = records.get(parameter.key)
        if record is None:
            out[parameter.key] = "the checkpoint has no parameter of this name; build the optimizer with the names then"
        elif tuple(record["shape"]) != parameter.shape:
            out[parameter.key] = f"it was saved with shape {tuple(record['shape'])}, and has {parameter.shape} here"
        else:
            problem = _other_options(parameter, configs[parameter.group], record, manifest)
            if problem:
                out[parameter.key] = problem
    return out


def _other_options(
    parameter: Parameter, config: ShampooConfig, record: Mapping[str, Any], manifest: Manifest
) -> str | None:
    try:
        saved = ShampooConfig.from_options(manifest.groups[str(record["group"])])
    except OptionError as error:
        return f"it was saved by another version: {error}"
    before, after = saved.shape_of_state(), config.shape_of_state()
    for name, value in after.items():
        if name not in _NOT_STORED and value != before[name]:
            was, is_ = getattr(saved, name), getattr(config, name)
            return f"it was saved with {name} = {was!r}, and here it is {is_!r}; set it to {was!r}"
    merged = record["merged"]
    treatment = treat(parameter, config)
    if treatment.preconditioned != (merged is not None):
        was_, is_ = ("preconditioned", "element-wise") if merged is not None else ("element-wise", "preconditioned")
        return f"it was saved as {was_}, and here it is {is_}; give the same exclude ({list(saved.exclude)}) and names"
    if treatment.preconditioned and cuts_of(treatment) != record["cuts"]:
        return "it was saved in other blocks; give the same rules and the same names, or model="
    return None


def what_does_not_fit(path: Path, problems: Mapping[str, str]) -> str:
    lines = [f"  {key}: {why}" for key, why in list(problems.items())[:5]]
    more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    return (
        f"the checkpoint {path} does not fit {len(problems)} parameters:\n"
        + "\n".join(lines)
        + more
        + "\nstrict=False goes on with those that fit and starts these anew"
    )


def restore_options(optimizer: BlockOptimizer, manifest: Manifest, keys: frozenset[str]) -> None:
    """Options of saved groups for today's groups that go on from them.

    A group keeps, with a warning, what the saved groups of its parameters do not share. Weight decay goes by what it
    did to each parameter: one host has two groups where another has one and ``no_decay``.

    Args:
        keys: of the parameters that go on.
    """
    numbers = {base_key(name): str(record["group"]) for name, record in manifest.parameters.items()}
    saved = {n: ShampooConfig.from_options(manifest.groups[n]) for n in {numbers[key] for key in keys}}
    configs = optimizer.configs()
    for group in optimizer.param_groups:
        number = group["shampoo_group"]
        config = configs[number]
        members = [e.parameter for e in optimizer.entries if e.parameter.group == number and e.parameter.key in keys]
        if not members:
            continue
        origins = sorted({numbers[parameter.key] for parameter in members})
        fixed = set(config.shape_of_state()) - {"betas"}
        differing = []
        for name in OPTION_NAMES:
            values = {getattr(saved[origin], name) for origin in origins} if name not in fixed else set()
            if len(values) == 1 and name != "weight_decay":
                _put(group, name, values.pop())
            elif len(values) > 1 and name != "weight_decay":
                differing.append(name)
        if differing:
            logger.warning(
                "group %s keeps its own %s: its parameters were in the groups %s of the checkpoint, which differ there",
                number,
                ", ".join(differing),
                ", ".join(origins),
            )
        _restore_decay(group, members, config, [saved[numbers[parameter.key]] for parameter in members])


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group[name], torch.Tensor):  # lr, which a compiled step or a scheduler may hold
        group[name].fill_(value)
    else:
        group[name] = value


def _restore_decay(
    group: dict[str, Any], members: Sequence[Parameter], config: ShampooConfig, saved: Sequence[ShampooConfig]
) -> None:
    """The weight decay that the group's decaying parameters had, and a warning about those that had another.

    Args:
        members: the group's parameters that go on.
        saved: the options that each was saved with.
    """
    was = [c.weight_decay if decays_under(p, c) else 0.0 for p, c in zip(members, saved, strict=True)]
    decaying = [decays_under(p, config) for p in members]
    wanted = {decay for decay, here in zip(was, decaying, strict=True) if here}
    if len(wanted) == 1:
        group["weight_decay"] = wanted.pop()
    elif len({c.weight_decay for c in saved}) == 1:
        group["weight_decay"] = saved[0].weight_decay
    now = [group["weight_decay"] if here else 0.0 for here in decaying]
    others = [(p.key, old, new) for p, old, new in zip(members, was, now, strict=True) if old != new]
    if others:
        logger.warning(
            "%d parameters have another weight decay than in the checkpoint's run, such as %s: %g there, %g here; give "
            "the same no_decay patterns or parameter groups as then (a DeepSpeed JSON leaves out norms and biases "
            "unless it says otherwise), or options=False to keep all of today's options",
            len(others),
            *others[0],
        )
