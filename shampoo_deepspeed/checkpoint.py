"""save_shampoo and load_shampoo: sharded factor state that any world size and any host can go on from.

A checkpoint is a folder with ``manifest.json`` and one ``data-<id>`` folder. Tensors are written first; the manifest,
put in place by one rename, makes the save complete; only then is the data of an earlier save removed.
"""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shampoo_deepspeed.base import BlockOptimizer
from shampoo_deepspeed.config import OPTION_NAMES, OptionError, ShampooConfig
from shampoo_deepspeed.hosts import Parameter
from shampoo_deepspeed.manifest import BlockLayout, CheckpointError, Manifest, layout_key, sync_directory
from shampoo_deepspeed.rules import STRIDE, number_under, rule_of
from shampoo_deepspeed.saved import SavedState, cpu_group, parameter_of
from shampoo_deepspeed.storage import INDEX, Item, StorageError, checksum, damage, write
from shampoo_deepspeed.stored import StoredState, base_key, block_layout, dtype_name, state_items, stored_name
from shampoo_deepspeed.unit import Treatment, treat

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


@dataclass(frozen=True)
class LoadReport:
    """What `load_shampoo` has found: keys of parameters that go on, and why others start anew."""

    loaded: tuple[str, ...]
    left_out: Mapping[str, str]


def save_shampoo(
    optimizer: BlockOptimizer,
    path: str | PathLike[str],
    *,
    asynchronous: bool = False,
    moments_dtype: torch.dtype | None = None,
) -> Future[None]:
    """Write the optimizer's state into the folder ``path``; call it on all ranks of the job.

    Every rank writes the blocks that it owns, so the folder must be one that all ranks see. An earlier checkpoint in
    it stays until the new one is complete.

    Args:
        asynchronous: return once the state is copied aside on the CPU; a thread writes it. The next save waits for
            it, as does the interpreter's exit.
        moments_dtype: dtype of moments on disk, e.g. torch.bfloat16, half the bytes and no longer bit-exact; None keeps
            theirs. Factor matrices, roots and master weights always keep theirs.

    Returns:
        A future, which is done already unless ``asynchronous``.

    Raises:
        CheckpointError: on all ranks, where one of them fails (from ``result()`` of the future if asynchronous), or
            where a loaded state dict waits for ``load_shampoo``.
        ValueError: for another ``moments_dtype`` than bfloat16, float32 or float64. In float16 second moments of small
            gradients would be 0, and the next steps without bound.
    """
    if moments_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"moments_dtype = {moments_dtype} is not allowed: None, bfloat16, float32 or float64")
    _wait_for_earlier_save()
    if optimizer.awaited is not None:
        raise CheckpointError(
            f"the optimizer has no state yet: it waits for what is saved elsewhere ({dict(optimizer.awaited)}); call "
            "load_shampoo(optimizer, path) on all ranks first"
        )
    optimizer.settle()
    group = _everyone(asynchronous)
    items, tables, error = _prepared(optimizer, moments_dtype, asynchronous)
    if not asynchronous:
        _save(Path(path), items, tables, error, group)
        _reopen(optimizer, Path(path))
        done: Future[None] = Future()
        done.set_result(None)
        return done
    future = _WRITER.submit(_save, Path(path), items, tables, error, group)
    _PENDING.append(future)
    # The files that it waits in may be those that this save replaces, and the next step may read them.
    if _waits_in_files(optimizer) and future.exception() is None:
        _reopen(optimizer, Path(path))
    return future


def load_shampoo(
    optimizer: BlockOptimizer, path: str | PathLike[str], *, strict: bool = True, options: bool = True
) -> LoadReport:
    """Go on from a checkpoint, from the next step on; call it on all ranks. World size and host may have changed.

    The files are checked now and read when the next step finds out what each rank owns; they must stay until then.

    Args:
        strict: raise where anything does not fit. Otherwise parameters that fit go on, the others start anew, and the
            report and a warning name them.
        options: take over lr and the other options that a group may change at any time, as torch's
            ``load_state_dict`` does; those that shape the state must be equal already.

    Raises:
        CheckpointError: on all ranks: no complete checkpoint, a damaged file, or (strict) what does not fit.
    """
    _wait_for_earlier_save()
    folder, group = Path(path), _everyone(False)
    manifest, problem = _checked_manifest(folder, group)
    known = [entry.parameter for entry in optimizer.entries]
    misfits = {} if manifest is None else _misfits(known, optimizer.configs(), manifest)
    words = _gathered((problem, [p.key for p in known], misfits), group)
    found = next((word[0] for word in words if word[0]), None)
    if found or manifest is None:
        raise CheckpointError(found)
    here = {key for _, keys, _ in words for key in keys}
    left_out = {key: why for _, _, reasons in words for key, why in reasons.items()}
    saved = {base_key(name) for name in manifest.parameters}
    unused = {key: "it is in the checkpoint, and no parameter here has this name" for key in sorted(saved - here)}
    if strict and (left_out or unused):
        raise CheckpointError(_what_does_not_fit(folder, {**left_out, **unused}))
    for key, why in {**left_out, **unused}.items():
        logger.warning("%s: %s; it starts anew", key, why)
    keys = frozenset((saved & {p.key for p in known}) - set(left_out))
    optimizer.take_state(StoredState(folder, manifest, keys))
    if options:
        _restore_options(optimizer, manifest, keys)
    return LoadReport(tuple(sorted(keys)), {**left_out, **unused})


_WRITER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shampoo-save")
_PENDING: list[Future[None]] = []
_WRITER_GROUPS: dict[dist.ProcessGroup, dist.ProcessGroup] = {}


def _wait_for_earlier_save() -> None:
    while _PENDING:
        _PENDING.pop().result()


def _everyone(asynchronous: bool) -> dist.ProcessGroup | None:
    """A group of all ranks for objects; the writing thread has one of its own, as two threads must not share one."""
    if not dist.is_initialized():
        return None
    world = dist.group.WORLD
    assert world is not None
    if not asynchronous:
        return cpu_group(world)
    if world not in _WRITER_GROUPS:
        made = dist.new_group(backend="gloo")
        assert made is not None
        _WRITER_GROUPS[world] = made
    return _WRITER_GROUPS[world]


def _gathered(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [mine]
    out: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(out, mine, group=group)
    return out


def _constant(tensor: torch.Tensor) -> Any:
    copy = tensor.detach().cpu().clone()
    return lambda: copy


def _prepared(
    optimizer: BlockOptimizer, moments: torch.dtype | None, copies: bool
) -> tuple[list[Item], dict[str, Any], Exception | None]:
    """What this rank writes and tells, or why it cannot, which the other ranks must hear before they wait for it.

    Args:
        copies: of the tensors, on the CPU: the next step changes the live ones.
    """
    try:
        items = list(_items(optimizer, moments))
        if copies:
            items = [replace(item, content=_constant(item.content())) for item in items]
        return items, _tables(optimizer, moments), None
    except (RuntimeError, OSError, MemoryError) as error:
        return [], {}, error


def _items(optimizer: BlockOptimizer, moments: torch.dtype | None) -> Iterable[Item]:
    shapes = {entry.parameter.key: entry.parameter.shape for entry in optimizer.entries}
    for unit in optimizer.units:
        state = SavedState.of_units([unit], optimizer.rejected_steps)
        yield from state_items(state, shapes, unit.layout.part, moments)
    waiting = optimizer.waiting_state
    if isinstance(waiting, StoredState):
        yield from waiting.items()
    elif waiting is not None:
        yield from state_items(waiting.everything(), shapes, None, moments)


def _tables(optimizer: BlockOptimizer, moments: torch.dtype | None) -> dict[str, Any]:
    """This rank's part of the manifest, in builtins."""
    waiting, configs = optimizer.waiting_state, optimizer.configs()
    known = {entry.parameter.key: entry.parameter for entry in optimizer.entries}
    numbers: dict[str, int | str] = {key: _options(parameter, configs) for key, parameter in known.items()}
    steps = dict(waiting.steps) if waiting is not None else {}
    parameters: dict[str, Mapping[str, Any]] = {
        stored_name(key, None): _record(p, steps.get(key, 0), configs, numbers[key]) for key, p in known.items()
    }
    layouts: dict[str, BlockLayout] = {}
    if isinstance(waiting, StoredState):
        records, as_stored = _tables_of_waiting(waiting, known)
        parameters |= records
        layouts |= as_stored
    elif waiting is not None:
        layouts |= _layouts(waiting.everything(), numbers, moments)
    for unit in optimizer.units:
        if unit.dtype != torch.float32:  # the blocks' bytes are others
            numbers |= {p.key: f"{numbers[p.key]} in {dtype_name(unit.dtype)}" for p in unit.parameters}
        for parameter, count in zip(unit.parameters, unit.steps, strict=True):
            parameters.pop(stored_name(parameter.key, None), None)
            name = stored_name(parameter.key, unit.layout.part)
            parameters[name] = _record(parameter, count, configs, numbers[parameter.key])
        layouts |= _layouts(SavedState.of_units([unit], 0), numbers, moments)
    # The rate is read from the group at every step and is not part of what is kept of its options. A host may have
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
) -> tuple[dict[str, Mapping[str, Any]], dict[str, BlockLayout]]:
    """Records and layouts of what is written again as it was stored, whatever the groups and dtypes of today's save."""
    directory = waiting.manifest.directory
    records: dict[str, Mapping[str, Any]] = {}
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


def _options(parameter: Parameter, configs: Mapping[int, ShampooConfig]) -> int:
    """The number of a parameter's options: its group's, or that of a rule within it."""
    rule = rule_of(parameter.name, parameter.kinds, parameter.shape, configs[parameter.group])
    return number_under(parameter.group, rule)


def _record(
    parameter: Parameter, steps: int, configs: Mapping[int, ShampooConfig], options: int | str
) -> dict[str, Any]:
    treatment = treat(parameter, configs[parameter.group])
    blocks = treatment.preconditioned
    return {
        "shape": list(parameter.shape),
        "group": parameter.group,
        "options": options,
        "steps": steps,
        "merged": list(treatment.merged) if blocks else None,
        "cuts": _cuts(treatment),
    }


def _cuts(treatment: Treatment) -> list[list[int]] | None:
    """Lengths of blocks in builtins, None where there are none."""
    return [list(along) for along in treatment.cuts] if treatment.preconditioned else None


def _layouts(
    state: SavedState, numbers: Mapping[str, int | str], moments: torch.dtype | None
) -> dict[str, BlockLayout]:
    out = {}
    for stack in state.stacks:
        for number in {numbers[parameter_of(key)] for key in stack["keys"]}:
            out[layout_key(number, stack["shape"])] = block_layout(stack, moments)
    return out


def _save(
    path: Path,
    items: Sequence[Item],
    tables: Mapping[str, Any],
    error: Exception | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Write what the ranks have prepared; a rank that could not gives the error."""
    rank = 0 if group is None else dist.get_rank(group)
    problem = next((found for found in _gathered(error and str(error), group) if found is not None), None)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be written: {problem}") from error
    folder, problem = _new_folder(path) if rank == 0 else (None, None)
    folder, problem = _gathered((folder, problem), group)[0]
    if problem:
        raise CheckpointError(f"{path} cannot be written: {problem}")
    directory = path / folder
    try:
        write(items, directory, group)
    except StorageError as error:
        if rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
        raise CheckpointError(str(error)) from error
    files, problem = _facts(directory, rank)
    everyones = _gathered((tables, files, problem), group)
    problem = next((found for _, _, found in everyones if found), None)
    if problem and rank == 0:
        shutil.rmtree(directory, ignore_errors=True)
    if rank == 0 and not problem:
        problem = _commit(path, directory, [(told, own) for told, own, _ in everyones])
    problem = _gathered(problem, group)[0]
    if problem:
        raise CheckpointError(f"{path} cannot be written: {problem}")


def _facts(directory: Path, rank: int) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Size and checksum of each file that this rank has written, and what went wrong."""
    try:
        own = [*directory.glob(f"__{rank}_*"), *([directory / INDEX] if rank == 0 else [])]
        return {file.name: {"bytes": file.stat().st_size, "crc32": checksum(file)} for file in own}, None
    except OSError as error:
        return {}, f"what was written cannot be read: {error}"


def _new_folder(path: Path) -> tuple[str | None, str | None]:
    folder = f"data-{uuid.uuid4().hex[:12]}"  # as _OURS knows it
    try:
        (path / folder).mkdir(parents=True)
    except OSError as error:
        return None, str(error)
    return folder, None


def _commit(
    path: Path, directory: Path, everyones: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> str | None:
    """Write the manifest and remove what it has replaced; gives what went wrong."""
    parameters: dict[str, Any] = {}
    for tables, _ in everyones:
        for name, record in tables["parameters"].items():
            if name not in parameters or record["steps"] > parameters[name]["steps"]:
                parameters[name] = record
    # A rank that has not met a parameter yet knows nothing of its parts.
    whole = {base_key(name) for name in parameters if base_key(name) != name and not name.endswith("@")}
    manifest = Manifest(
        directory=directory.name,
        world_size=len(everyones),
        rejected_steps=max(tables["rejected_steps"] for tables, _ in everyones),
        groups={number: options for tables, _ in everyones for number, options in tables["groups"].items()},
        parameters={name: record for name, record in sorted(parameters.items()) if name not in whole},
        layouts={key: layout for tables, _ in everyones for key, layout in tables["layouts"].items()},
        files={name: facts for _, files in everyones for name, facts in files.items()},
        versions={"torch": torch.__version__},
    )
    unseen = [name for name in manifest.files if not (directory / name).is_file()]
    if unseen:
        return f"{', '.join(sorted(unseen)[:3])} of other ranks cannot be seen here: all ranks must share the folder"
    try:
        sync_directory(directory)
        manifest.commit(path)
    except OSError as error:
        return str(error)
    _remove_replaced(path, manifest.directory)
    return None


# What a save makes in a checkpoint's folder, beside the manifest; anything else there belongs to others.
_OURS = re.compile(r"(manifest\.json\.)?data-[0-9a-f]{12}")


def _remove_replaced(path: Path, directory: str) -> None:
    """Remove what earlier saves have left. The new one is complete, so what cannot be removed is no failure."""
    for old in [found for found in path.iterdir() if _OURS.fullmatch(found.name) and found.name != directory]:
        try:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
        except OSError as error:
            logger.warning("%s is of an earlier save and could not be removed: %s", old, error)


def _waits_in_files(optimizer: BlockOptimizer) -> bool:
    return isinstance(optimizer.waiting_state, StoredState) and optimizer.waiting_state.has_left


def _reopen(optimizer: BlockOptimizer, path: Path) -> None:
    """State that waits lies in the save just written too, and that is the one that will be kept."""
    waiting = optimizer.waiting_state
    if isinstance(waiting, StoredState) and waiting.has_left:
        optimizer.waiting_state = StoredState(path, Manifest.read(path), waiting.keys)


def _checked_manifest(path: Path, group: dist.ProcessGroup | None) -> tuple[Manifest | None, str | None]:
    """The manifest and what is wrong; each rank checks its share of the files."""
    rank, size = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    try:
        manifest = Manifest.read(path)
        share = dict(sorted(manifest.files.items())[rank::size])
        return manifest, damage(path / manifest.directory, share)
    except (CheckpointError, OSError) as error:  # the other ranks wait for this one's word
        return None, str(error)


def _misfits(known: Sequence[Parameter], configs: Mapping[int, ShampooConfig], manifest: Manifest) -> dict[str, str]:
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
    if treatment.preconditioned and _cuts(treatment) != record["cuts"]:
        return "it was saved in other blocks; give the same rules and the same names, or model="
    return None


def _what_does_not_fit(path: Path, problems: Mapping[str, str]) -> str:
    lines = [f"  {key}: {why}" for key, why in list(problems.items())[:5]]
    more = f"\n  and {len(problems) - 5} more" if len(problems) > 5 else ""
    return (
        f"the checkpoint {path} does not fit {len(problems)} parameters:\n"
        + "\n".join(lines)
        + more
        + "\nstrict=False goes on with those that fit and starts these anew"
    )


def _restore_options(optimizer: BlockOptimizer, manifest: Manifest, keys: frozenset[str]) -> None:
    """Options of saved groups for the groups of today whose parameters all come from one saved group."""
    numbers = {base_key(name): record["group"] for name, record in manifest.parameters.items()}
    configs = optimizer.configs()
    for group in optimizer.param_groups:
        fixed = set(configs[group["shampoo_group"]].shape_of_state())
        members = [e.parameter.key for e in optimizer.entries if e.parameter.group == group["shampoo_group"]]
        origins = {numbers[key] for key in members if key in keys}
        if len(origins) != 1:
            continue
        saved = ShampooConfig.from_options(manifest.groups[str(origins.pop())])
        for name in OPTION_NAMES:
            if name == "lr" and isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(saved.lr)
            elif name not in fixed or name == "betas":
                group[name] = getattr(saved, name)
