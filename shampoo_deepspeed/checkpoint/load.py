"""load_shampoo: check a checkpoint on all ranks together, find what fits, and let the next step read it."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shampoo_deepspeed.checkpoint.async_writer import WRITER
from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable, quoted
from shampoo_deepspeed.checkpoint.manifest import Manifest, open_checkpoint
from shampoo_deepspeed.checkpoint.schema import base_key, options_record
from shampoo_deepspeed.checkpoint.stored_state import StoredState
from shampoo_deepspeed.checkpoint.tensor_files import TensorFiles
from shampoo_deepspeed.distributed.collectives import (
    all_gather_objects,
    decide_on_first_rank,
    first_rank_that,
    job_group,
    object_of_rank,
    on_all_ranks,
)
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.parameter_registry import ParameterRegistry
from shampoo_deepspeed.engine.policy import Policy, decays_under
from shampoo_deepspeed.options.checks import LARGEST_RATE, OptionError, real
from shampoo_deepspeed.options.config import (
    CONVERTED,
    NOT_STORED,
    OPTION_NAMES,
    ShampooConfig,
    options_with,
    replaced_options,
)
from shampoo_deepspeed.options.param_groups import from_json
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer
from shampoo_deepspeed.state.unwrap import unwrap

logger = logging.getLogger("shampoo_deepspeed")

# Options that are checked together: restoring only some of them may give a combination that is not allowed.
_TOGETHER = (
    ("momentum", "dampening", "nesterov"),
    ("grafting", "elementwise"),
    ("weight_decay_type", "decoupled_weight_decay", "peak_lr"),
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_shampoo` has found: keys of parameters that resume, and why others start with new state."""

    loaded: tuple[str, ...]
    left_out: Mapping[str, str]


def load_shampoo(optimizer: Any, path: str | PathLike[str], *, strict: bool = True, options: bool = True) -> LoadReport:
    """Resume from a checkpoint at the next step; call it on all ranks. World size and framework may have changed.

    The files are checked now, each rank reading an equal part of them, and stay open. The next step reads them, when it
    is known what each rank owns, and verifies again what it reads; the files may be deleted before.

    Args:
        optimizer: as for ``save_shampoo``.
        strict: raise if anything does not fit. Otherwise parameters that fit resume, the others start with new state,
            and the report and a warning name them.
        options: restore lr and the other options that a group may change at any time, as torch's
            ``load_state_dict`` does, and what schedulers keep in groups (``initial_lr`` and others). Options that shape
            the state must be equal already.

    Raises:
        CheckpointError: on all ranks: no complete checkpoint, a damaged file, or (strict) what does not fit or holds
            values that are not finite.
        TypeError: if there is no Shampoo in ``optimizer``.
    """
    optimizer = optimizer if isinstance(optimizer, BlockOptimizer) else unwrap(optimizer)
    if WRITER.unfinished:
        WRITER.wait(optimizer)
    group = job_group()
    with on_all_ranks(group):
        folder = _resolved(path)
        manifest, files = _opened(folder)
    keys_of = {name: base_key(name) for name in manifest.parameters}
    records = {keys_of[name]: record for name, record in manifest.parameters.items()}
    configs = optimizer.configs()
    known = [entry.parameter for entry in optimizer.entries]
    unfit = _incompatibilities(known, optimizer.policies, configs, records, manifest)
    seen = _Seen(manifest.directory, {parameter.key for parameter in known}, unfit)
    unfit, here = _seen_by_all(seen, folder, group)
    unfit |= _verified(files, keys_of, unfit, group) if not (strict and unfit) else {}
    unused = {
        key: "it is in the checkpoint, but no parameter here has this name" for key in sorted(set(records) - here)
    }
    left_out = {**unfit, **unused}
    if strict and left_out:
        raise CheckpointError(_what_does_not_fit(folder, left_out))
    for key, why in left_out.items():
        logger.warning("%s: %s%s", printable(key), why, "" if key in unused else "; it starts with new state")
    going_on = [parameter for parameter in known if parameter.key in records and parameter.key not in unfit]
    keys = frozenset(parameter.key for parameter in going_on)
    # Before the state is taken, so that an error here leaves the optimizer as it was.
    restored = _restored_options(optimizer, going_on, configs, records, manifest) if options else []
    optimizer.take_state(StoredState(folder, manifest, keys, files).without(set()))
    for own, values in restored:
        for name, value in values.items():
            _put(own, name, value)
    steps = sorted({records[parameter.key]["steps"] for parameter in going_on})
    if steps and logger.isEnabledFor(logging.INFO) and (group is None or dist.get_rank() == 0):
        shown = printable(str(folder))
        logger.info("resumed Shampoo's state of step %d from %s (%d parameters)", steps[-1], shown, len(keys))
    return LoadReport(tuple(sorted(keys)), left_out)


@dataclass
class _Seen:
    """What one rank finds: the save, the keys of all parameters, and why some of them cannot resume from it."""

    directory: str
    keys: set[str]
    unfit: dict[str, str]


def _seen_by_all(seen: _Seen, folder: Path, group: dist.ProcessGroup | None) -> tuple[dict[str, str], set[str]]:
    """What does not fit on any rank, and the keys of all parameters.

    Usually all ranks see the same, so what many ranks send does not grow with the model.

    Raises:
        CheckpointError: if the ranks see different saves.
    """
    if first_rank_that(object_of_rank(0, seen, group) != seen, group) is None:
        return seen.unfit, seen.keys
    return decide_on_first_rank(seen, partial(_joined, folder), group)


def _joined(path: Path, ranks: Sequence[_Seen]) -> tuple[dict[str, str], set[str]]:
    """What does not fit on any rank, and the keys of all parameters.

    Raises:
        CheckpointError: if the ranks see different saves.
    """
    directories = {seen.directory for seen in ranks}
    if len(directories) > 1:
        raise CheckpointError(
            f"the ranks see different saves in {path} ({', '.join(sorted(directories))}): wait until all ranks see "
            "the newest one"
        )
    unfit = {key: why for seen in ranks for key, why in seen.unfit.items()}
    return unfit, {key for seen in ranks for key in seen.keys}


def _resolved(path: str | PathLike[str]) -> Path:
    """The folder at a path as it is now.

    The files are read later, when the script may have changed directory, or a link to its newest checkpoint. Unlike
    `Path.resolve`, this leaves a link that leads in a circle to the error that names it.

    Raises:
        CheckpointError: for a path that no folder can have.
    """
    try:
        return Path(os.path.realpath(path))
    except ValueError as error:  # a null byte, or text that cannot be encoded
        raise CheckpointError(f"{quoted(path)} cannot be read: {error}") from error


def _opened(path: Path) -> tuple[Manifest, TensorFiles]:
    """The manifest and the open files.

    Raises:
        CheckpointError: if there is no complete checkpoint, or one that does not hold together.
    """
    try:
        return open_checkpoint(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error


def _verified(
    files: TensorFiles, keys_of: Mapping[str, str], unfit: Mapping[str, str], group: dist.ProcessGroup | None
) -> dict[str, str]:
    """Verify this rank's part of the parameters that fit; returns which of them no rank can resume from, and why.

    Args:
        keys_of: keys by stored names.
        unfit: keys of parameters that do not fit.

    Raises:
        CheckpointError: on all ranks, if a file is damaged or cannot be read.
    """
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    with on_all_ranks(group):
        try:
            found = files.verify(rank, size, {name for name, key in keys_of.items() if key not in unfit})
        except OSError as error:
            raise CheckpointError(f"{files.directory} cannot be read: {error}") from error
    if first_rank_that(bool(found), group) is None:
        return {}
    return {
        keys_of[name]: f"it was saved with values that are {problem}, in {printable(tensor)}"
        for part in all_gather_objects(found, group)
        for name, (tensor, problem) in part.items()
    }


def _incompatibilities(
    known: Sequence[Parameter],
    policies: Mapping[str, Policy],
    configs: Mapping[int, ShampooConfig],
    records: Mapping[str, Mapping[str, Any]],
    manifest: Manifest,
) -> dict[str, str]:
    """Why parameters of this rank cannot resume from a checkpoint, by key."""
    pairs = {(str(records[p.key]["group"]), p.group) for p in known if p.key in records}
    other_options = {(saved, own): _other_options(manifest.groups[saved], configs[own]) for saved, own in sorted(pairs)}
    out = {}
    for parameter in known:
        record = records.get(parameter.key)
        if record is None:
            out[parameter.key] = (
                "the checkpoint has no parameter of this name; build the optimizer with the names used then"
            )
            continue
        if tuple(record["shape"]) != parameter.shape:
            out[parameter.key] = f"it was saved with shape {tuple(record['shape'])}, but has {parameter.shape} here"
            continue
        group = str(record["group"])
        problem = other_options[group, parameter.group] or _other_blocks(policies[parameter.key], record, manifest)
        if problem is not None:
            out[parameter.key] = problem
    return out


def _other_options(record: Mapping[str, Any], config: ShampooConfig) -> str | None:
    """Why blocks that were saved under a group's options cannot resume under the current ones, or None."""
    if 0.0 <= record["lr"] <= LARGEST_RATE and record == options_record(config, record["lr"]):
        return None
    try:
        saved = ShampooConfig.from_saved(record)
    except OptionError as error:
        return f"it was saved by another version: {printable(str(error))}"
    except Exception as error:  # of a type that no option has
        return f"it was saved with options that cannot be: {quoted(error)}"
    for name in saved.reshaped_by(config):
        if name not in options_with(NOT_STORED) and name not in options_with(CONVERTED):
            was, is_ = saved.in_force(name), config.in_force(name)
            return f"it was saved with {name} = {was!r}, but here it is {is_!r}; set it to {was!r}"
    return None


def _other_blocks(policy: Policy, record: Mapping[str, Any], manifest: Manifest) -> str | None:
    """Why a parameter cannot resume from the blocks or element-wise state that were saved, or None."""
    blocks = [list(along) for along in policy.cuts] if policy.reason is None else None
    if (blocks is None) != (record["cuts"] is None):
        was, is_ = ("preconditioned", "element-wise") if blocks is None else ("element-wise", "preconditioned")
        exclude = list(ShampooConfig.from_saved(manifest.groups[str(record["group"])]).exclude)
        return f"it was saved as {was}, but here it is {is_}; give the same exclude ({exclude}) and names"
    if blocks != record["cuts"]:
        return "it was saved with other blocks; give the same rules and the same names, or model="
    return None


def _what_does_not_fit(path: Path, problems: Mapping[str, str]) -> str:
    lines = [f"  {printable(key)}: {why}" for key, why in list(problems.items())[:5]]
    more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    return (
        f"the checkpoint {path} does not fit {len(problems)} parameters:\n"
        + "\n".join(lines)
        + more
        + "\nstrict=False resumes those that fit and starts these with new state"
    )


def _restored_options(
    optimizer: BlockOptimizer,
    going_on: Sequence[Parameter],
    configs: Mapping[int, ShampooConfig],
    records: Mapping[str, Mapping[str, Any]],
    manifest: Manifest,
) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The current groups, each with the values that it gets from the saved groups from which it resumes.

    If the saved groups of a group's parameters differ in an option, the group keeps its own, with a warning. Weight
    decay is compared by its effect on each parameter: one framework has two groups, another one and ``no_decay``.
    """
    restored = []
    for group in optimizer.param_groups:
        number = group["shampoo_group"]
        members = [parameter for parameter in going_on if parameter.group == number]
        values = _kept_by_others(group, {str(records[parameter.key]["group"]) for parameter in members}, manifest)
        if members and not _as_saved(group, members, optimizer.policies, configs, records, manifest):
            values |= _saved_options(group, members, optimizer.registry, configs[number], records, manifest)
        restored.append((group, values))
    return restored


def _kept_by_others(group: Mapping[str, Any], saved: set[str], manifest: Manifest) -> dict[str, Any]:
    """What schedulers and users kept in a group, where the saved groups of its parameters agree."""
    found = [manifest.kept_by_others.get(number, {}) for number in sorted(saved)]
    values, differing = {}, []
    for key in sorted({key for kept in found for key in kept}):
        if any(kept.get(key) != found[0].get(key) for kept in found):
            differing.append(printable(key))
        else:
            value = from_json(found[0][key])
            values[key] = tuple(value) if isinstance(group.get(key), tuple) and isinstance(value, list) else value
    if differing:
        logger.warning(
            "group %s keeps its own %s: its parameters were in the groups %s of the checkpoint, which differ in them",
            group["shampoo_group"],
            ", ".join(differing),
            ", ".join(sorted(saved)),
        )
    return values


def _as_saved(
    group: Mapping[str, Any],
    members: Sequence[Parameter],
    policies: Mapping[str, Policy],
    configs: Mapping[int, ShampooConfig],
    records: Mapping[str, Mapping[str, Any]],
    manifest: Manifest,
) -> bool:
    """Whether a group already has the options with which all of its parameters were saved."""
    if any(records[p.key]["decays"] != policies[p.key].decays for p in members):
        return False
    own = options_record(configs[group["shampoo_group"]], group["lr"])
    return all(manifest.groups[number] == own for number in {str(records[p.key]["group"]) for p in members})


def _saved_options(
    group: Mapping[str, Any],
    members: Sequence[Parameter],
    registry: ParameterRegistry,
    config: ShampooConfig,
    records: Mapping[str, Mapping[str, Any]],
    manifest: Manifest,
) -> dict[str, Any]:
    """The options that one group restores.

    Args:
        members: its parameters that resume.
        registry: the optimizer's.
        config: its current options.
    """
    origin = {parameter.key: str(records[parameter.key]["group"]) for parameter in members}
    saved = {number: ShampooConfig.from_saved(manifest.groups[number]) for number in sorted(set(origin.values()))}
    values = _shared_options(group["shampoo_group"], registry, config, saved)
    was = {}
    for parameter in members:
        before = saved[origin[parameter.key]]
        was[parameter.key] = before.weight_decay if records[parameter.key]["decays"] else 0.0
    return values | _saved_decay(group["weight_decay"], [p for p in members if not p.frozen], config, was)


def _shared_options(
    number: int, registry: ParameterRegistry, config: ShampooConfig, saved: Mapping[str, ShampooConfig]
) -> dict[str, Any]:
    """The options, except weight decay, in which the saved groups of a group's parameters agree, where they fit."""
    first = next(iter(saved.values()))
    shared, differing = _restorable(list(saved.values()), config)
    if differing:
        logger.warning(
            "group %s keeps its own %s: its parameters were in the groups %s of the checkpoint, which differ in them",
            number,
            ", ".join(differing),
            ", ".join(saved),
        )
    own = {name: getattr(config, name) for name in OPTION_NAMES}
    try:
        taken = ShampooConfig(**{**own, **{name: getattr(first, name) for name in shared}})
        registry.refuse_dtypes(number, taken)
    except OptionError as error:
        logger.warning(
            "group %s keeps its own options except lr, as the checkpoint's do not fit them: %s",
            number,
            printable(str(error)),
        )
        shared = [name for name in shared if name == "lr"]
    changed = replaced_options(config, first, shared)
    if changed:
        logger.warning("group %s now uses the checkpoint's %s", number, changed)
    return {name: getattr(first, name) for name in shared}


def _restorable(saved: Sequence[ShampooConfig], config: ShampooConfig) -> tuple[list[str], list[str]]:
    """Which options a group restores from the saved groups of its parameters, and in which these differ."""
    # These only need the same tensors, which has been checked.
    fixed = set(config.shape_of_state()) - {"betas", "elementwise_betas", "grafting", "elementwise", "solver"}
    equal = {name for name in OPTION_NAMES if all(getattr(s, name) == getattr(saved[0], name) for s in saved)}
    differing = [name for name in OPTION_NAMES if name not in equal | fixed and name != "weight_decay"]
    taken = equal - fixed - {"weight_decay"}
    for together in _TOGETHER:
        stay = {name for name in together if name not in taken}
        if any(name not in equal or getattr(config, name) != getattr(saved[0], name) for name in stay):
            taken -= set(together)
    return [name for name in OPTION_NAMES if name in taken], differing


def _put(group: dict[str, Any], name: str, value: Any) -> None:
    """Put a value into a group: a number into its floating tensor, which a compiled step or a scheduler may hold."""
    own, number = group.get(name), real(value)
    if number is None or not (isinstance(own, torch.Tensor) and own.numel() == 1 and own.is_floating_point()):
        group[name] = value
        return
    number = torch.tensor(number, dtype=own.dtype, device="cpu").item()  # one beyond its range fills it with infinity
    # One that was made in inference mode can be changed only in that mode, and a leaf only while nothing is recorded.
    with torch.inference_mode(own.is_inference()), torch.no_grad():
        own.fill_(number)


def _saved_decay(
    now: float, members: Sequence[Parameter], config: ShampooConfig, was: Mapping[str, float]
) -> dict[str, float]:
    """The weight decay that the group's decaying parameters had, if they agree; warns about those that had another.

    Args:
        now: the group's present one.
        members: the group's parameters that resume and are trained.
        was: the weight decay in force for each of them when it was saved, by key.
    """
    decaying = {p.key for p in members if decays_under(p, config)}
    wanted = {was[key] for key in decaying}
    restored = {"weight_decay": wanted.pop()} if len(wanted) == 1 else {}
    here = {p.key: restored.get("weight_decay", now) if p.key in decaying else 0.0 for p in members}
    others = [key for key in here if here[key] != was[key]]
    if others:
        logger.warning(
            "%d parameters have a different weight decay than in the checkpoint's run, such as %s: %g there, %g here; "
            "give the same no_decay patterns or parameter groups as then (a DeepSpeed JSON leaves out norms and biases "
            "unless it says otherwise), or options=False to keep all of today's options",
            len(others),
            printable(others[0]),
            was[others[0]],
            here[others[0]],
        )
    return restored
