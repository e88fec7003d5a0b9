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
from shampoo_deepspeed.treatment import treat
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
    """Options of saved groups for the groups of today whose parameters all come from one saved group."""
    numbers = {base_key(name): record["group"] for name, record in manifest.parameters.items()}
    configs = optimizer.configs()
    for group in optimizer.param_groups:
        fixed = set(configs[group["shampoo_group"]].shape_of_state())
        members = [e.parameter.key for e in optimizer.entries if e.parameter.group == group["shampoo_group"]]
        origins = {numbers[key] for key in members if key in keys}
        if len(origins) > 1:
            logger.warning(
                "group %s keeps its own lr and other options: its parameters were in the groups %s of the checkpoint",
                group["shampoo_group"],
                sorted(origins),
            )
        if len(origins) != 1:
            continue
        saved = ShampooConfig.from_options(manifest.groups[str(origins.pop())])
        for name in OPTION_NAMES:
            if name == "lr" and isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(saved.lr)
            elif name not in fixed or name == "betas":
                group[name] = getattr(saved, name)
