"""What of a checkpoint fits an optimizer, and why the rest does not."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.checkpoint.records import cuts_of
from shampoo_deepspeed.checkpoint.stored_state import base_key
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import Policy, decays_under
from shampoo_deepspeed.options.checks import OptionError
from shampoo_deepspeed.options.config import OPTION_NAMES, ShampooConfig
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

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
# What schedules change, so that it differs at most resumptions.
_SCHEDULED = ("lr", "peak_lr", "betas", "momentum")
# What is checked together, so that some of it alone may be a combination that is not allowed.
_TOGETHER = (
    ("momentum", "dampening", "nesterov"),
    ("weight_decay_type", "decoupled_weight_decay", "peak_lr"),
    ("precondition_frequency", "start_preconditioning_step"),
)


def incompatibilities(
    known: Sequence[Parameter],
    policies: Mapping[str, Policy],
    configs: Mapping[int, ShampooConfig],
    manifest: Manifest,
) -> dict[str, str]:
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
            problem = _other_options(policies[parameter.key], configs[parameter.group], record, manifest)
            if problem:
                out[parameter.key] = problem
    return out


def _other_options(policy: Policy, config: ShampooConfig, record: Mapping[str, Any], manifest: Manifest) -> str | None:
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
    if policy.preconditioned != (merged is not None):
        was_, is_ = ("preconditioned", "element-wise") if merged is not None else ("element-wise", "preconditioned")
        return f"it was saved as {was_}, and here it is {is_}; give the same exclude ({list(saved.exclude)}) and names"
    if policy.preconditioned and cuts_of(policy) != record["cuts"]:
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
    did to each parameter: one framework has two groups where another has one and ``no_decay``.

    Args:
        keys: of the parameters that go on.
    """
    records = {base_key(name): record for name, record in manifest.parameters.items()}
    origin = {key: str(records[key]["group"]) for key in keys}
    saved = {number: ShampooConfig.from_options(manifest.groups[number]) for number in set(origin.values())}
    configs = optimizer.configs()
    for group in optimizer.param_groups:
        number = group["shampoo_group"]
        config = configs[number]
        members = [e.parameter for e in optimizer.entries if e.parameter.group == number and e.parameter.key in keys]
        if not members:
            continue
        origins = sorted({origin[parameter.key] for parameter in members})
        _take_over(group, config, {o: saved[o] for o in origins})
        was = {}
        for parameter in members:
            before = saved[origin[parameter.key]]
            decays = records[parameter.key].get("decays", decays_under(parameter, before))  # older saves do not tell
            was[parameter.key] = before.weight_decay if decays else 0.0
        _restore_decay(group, [p for p in members if not p.frozen], config, was)


def _take_over(group: dict[str, Any], config: ShampooConfig, saved: Mapping[str, ShampooConfig]) -> None:
    """The options, but for weight decay, that the saved groups of a group's parameters share."""
    number, first = group["shampoo_group"], next(iter(saved.values()))
    shared, differing = _restorable(list(saved.values()), config)
    if differing:
        logger.warning(
            "group %s keeps its own %s: its parameters were in the groups %s of the checkpoint, which differ there",
            number,
            ", ".join(differing),
            ", ".join(saved),
        )
    own = {name: getattr(config, name) for name in OPTION_NAMES}
    try:
        ShampooConfig(**{**own, **{name: getattr(first, name) for name in shared}})
    except OptionError as error:
        logger.warning(
            "group %s keeps its own options but lr, as the checkpoint's do not go with them: %s", number, error
        )
        shared = [name for name in shared if name == "lr"]
    changed = [n for n in shared if n not in _SCHEDULED and own[n] != getattr(first, n)]
    if changed:
        logger.warning(
            "group %s goes on with the checkpoint's %s",
            number,
            ", ".join(f"{name} = {getattr(first, name)!r} (given here: {own[name]!r})" for name in changed),
        )
    for name in shared:
        _put(group, name, getattr(first, name))


def _restorable(saved: Sequence[ShampooConfig], config: ShampooConfig) -> tuple[list[str], list[str]]:
    """Which options a group takes over from the saved groups of its parameters, and in which these differ."""
    fixed = set(config.shape_of_state()) - {"betas"}
    equal = {name for name in OPTION_NAMES if all(getattr(s, name) == getattr(saved[0], name) for s in saved)}
    differing = [name for name in OPTION_NAMES if name not in equal | fixed and name != "weight_decay"]
    taken = equal - fixed - {"weight_decay"}
    for together in _TOGETHER:
        stay = {name for name in together if name not in taken}
        if any(name not in equal or getattr(config, name) != getattr(saved[0], name) for name in stay):
            taken -= set(together)
    return [name for name in OPTION_NAMES if name in taken], differing


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    if isinstance(group[name], torch.Tensor):  # lr, which a compiled step or a scheduler may hold
        group[name].fill_(value)
    else:
        group[name] = value


def _restore_decay(
    group: dict[str, Any], members: Sequence[Parameter], config: ShampooConfig, was: Mapping[str, float]
) -> None:
    """The weight decay that the group's decaying parameters had, and a warning about those that had another.

    Args:
        members: the group's parameters that go on and are trained.
        was: the weight decay in force for each of them when it was saved, by key.
    """
    decaying = {p.key for p in members if decays_under(p, config)}
    wanted = {was[key] for key in decaying}
    if len(wanted) == 1:
        group["weight_decay"] = wanted.pop()
    now = {p.key: group["weight_decay"] if p.key in decaying else 0.0 for p in members}
    others = [key for key in now if now[key] != was[key]]
    if others:
        logger.warning(
            "%d parameters have another weight decay than in the checkpoint's run, such as %s: %g there, %g here; give "
            "the same no_decay patterns or parameter groups as then (a DeepSpeed JSON leaves out norms and biases "
            "unless it says otherwise), or options=False to keep all of today's options",
            len(others),
            others[0],
            was[others[0]],
            now[others[0]],
        )
