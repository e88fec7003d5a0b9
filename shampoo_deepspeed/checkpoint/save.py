"""save_shampoo: all ranks write a checkpoint together, data first, then the manifest, which makes it complete."""

from __future__ import annotations

import logging
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_deepspeed._version import __version__
from shampoo_deepspeed.checkpoint.async_writer import WRITER
from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable
from shampoo_deepspeed.checkpoint.lock import FolderLock
from shampoo_deepspeed.checkpoint.manifest import NAME as MANIFEST
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.checkpoint.schema import base_key, fits, layout_key, options_record, stored_name
from shampoo_deepspeed.checkpoint.stored_state import StoredState
from shampoo_deepspeed.checkpoint.tensor_files import Item, Place, Written, file_name, in_order, sizes, stored_form
from shampoo_deepspeed.checkpoint.writer import sync_directory, write, write_manifest
from shampoo_deepspeed.distributed.collectives import decide_on_first_rank, job_group, on_all_ranks
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import Policy
from shampoo_deepspeed.engine.step_unit import StepUnit
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.options.param_groups import KEYS_OF_GROUPS, kept_by_others
from shampoo_deepspeed.options.rules import STRIDE
from shampoo_deepspeed.state.block_codec import BlockLayout, Form, block_layout, dtype_name, stored_tensors
from shampoo_deepspeed.state.state_dict import SavedState, view_of
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer
from shampoo_deepspeed.state.unwrap import unwrap

logger = logging.getLogger("shampoo_deepspeed")


def save_shampoo(
    optimizer: Any,
    path: str | PathLike[str],
    *,
    asynchronous: bool = False,
    moments_dtype: torch.dtype | None = None,
    packed_factors: bool = False,
) -> Future[None]:
    """Write the optimizer's state into the folder ``path``; call it on all ranks of the job.

    Every rank writes the blocks that it owns, so all ranks must see the folder. An earlier checkpoint in
    it stays until the new one is complete.

    Args:
        optimizer: a Shampoo optimizer, or an object with one inside: a framework's wrapper, a DeepSpeed engine, or a
            Trainer that has begun to train.
        asynchronous: return once the state has been copied to CPU memory; a thread writes it, together with those of
            the other ranks. The next save waits for it, as does the interpreter's exit. Before
            ``dist.destroy_process_group()`` call ``result()`` of the future or `wait_for_saves`: without its process
            group a save cannot be completed.
        moments_dtype: dtype of moments on disk, e.g. torch.bfloat16: half the bytes, but not bit-exact. None keeps
            theirs. Factor matrices, roots and master weights always keep theirs.
        packed_factors: write only the lower triangles of factor matrices; the rest is never read. This saves up to a
            sixth on disk, and a resumed run is still bit-exact. Packing takes a pass over the matrices.

    Returns:
        A future, which is done already unless ``asynchronous``.

    Raises:
        CheckpointError: on all ranks, if one of them fails (from ``result()`` of the future if asynchronous), or if a
            loaded state dict waits for ``load_shampoo``.
        TypeError: if there is no Shampoo in ``optimizer``.
        ValueError: for an empty path, and for another ``moments_dtype`` than bfloat16, float32 or float64. In float16
            second moments of small gradients would be 0, and the next steps unbounded.
    """
    optimizer = optimizer if isinstance(optimizer, BlockOptimizer) else unwrap(optimizer)
    if moments_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"moments_dtype = {moments_dtype} is not allowed: None, bfloat16, float32 or float64")
    if WRITER.unfinished:
        WRITER.wait(optimizer)
    if optimizer.averages_in_use or optimizer.in_step:
        optimizer.refuse_now("save_shampoo()")
    keeper = optimizer.state_keeper
    if keeper.external is not None:
        raise CheckpointError(
            f"the optimizer has no state yet: its loaded state dict says where it is ({dict(keeper.external)}); "
            "call load_shampoo(optimizer, path) on all ranks first"
        )
    optimizer.finish_step()
    if not os.fspath(path):
        raise ValueError("path is empty: give the folder of the checkpoint")
    folder = Path(path).absolute()  # the script may change directory while a thread writes
    # An error here is raised on all ranks together, in `write_checkpoint`.
    share = _attempt(lambda: share_of(optimizer, Form(moments_dtype, packed_factors), asynchronous))
    group = job_group(in_a_thread=asynchronous)
    job = partial(write_checkpoint, folder, share, group)
    future = WRITER.submit(optimizer, folder, job, group) if asynchronous else _attempt(job)
    if not asynchronous:
        future.result()
    return future


@dataclass
class Share:
    """One rank's part of a checkpoint: tensors, and its entries of the manifest in builtins.

    If several ranks share a parameter, its entry comes from the first rank of its unit.
    """

    groups: dict[str, dict[str, Any]]
    rejected_steps: int
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    layouts: dict[str, BlockLayout] = field(default_factory=dict)
    items: list[Item] = field(default_factory=list)
    written: list[Written] = field(default_factory=list)
    bytes: int = 0  # of the rank's file
    kept_by_others: dict[str, dict[str, Any]] = field(default_factory=dict)


def share_of(optimizer: BlockOptimizer, form: Form, copies: bool = False) -> Share:
    """This rank's share.

    Args:
        form: of the state on disk.
        copies: copy the tensors to the CPU, because the next step changes the live ones.
    """
    if optimizer.state_keeper.waiting is not None:
        optimizer.take_waiting()
    live = {group["shampoo_group"]: group["lr"] for group in optimizer.param_groups}
    # A framework may have removed groups that have no parameters.
    configs = {number: config for number, config in optimizer.configs().items() if number < STRIDE}
    groups = {str(n): options_record(config, live.get(n, config.lr)) for n, config in configs.items()}
    others = {
        str(group["shampoo_group"]): {key: value for key, value in kept_by_others(group).items() if fits(key, value)}
        for group in optimizer.param_groups
        if group.keys() - KEYS_OF_GROUPS
    }
    share = Share(groups, optimizer.rejected_steps, kept_by_others=others)
    _add_waiting(share, optimizer, form)
    for unit in optimizer.units:
        state = SavedState.of_units([unit], share.rejected_steps)
        _add_unit(share, unit, _copied(state) if copies else state, optimizer.policies, form)
    return share


def _copied(state: SavedState) -> SavedState:
    """The state with a copy of every tensor on the CPU: one copy for each stack, not for each block."""
    return replace(
        state,
        stacks=[replace(stack, tensors=_copies(stack.tensors)) for stack in state.stacks],
        elementwise=[replace(part, tensors=_copies(part.tensors)) for part in state.elementwise],
        buffers=[replace(found, buffer=found.buffer.detach().to("cpu", copy=True)) for found in state.buffers],
    )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def _add_unit(share: Share, unit: StepUnit, state: SavedState, policies: Mapping[str, Policy], form: Form) -> None:
    """Add a unit's state and, on its first rank, the records of its parameters."""
    part = unit.layout.part
    names = {p.key: stored_name(p.key, part) for p in unit.parameters}
    # Blocks of another dtype have other bytes.
    suffix = "" if unit.dtype == torch.float32 else f" in {dtype_name(unit.dtype)}"
    options = {p.key: f"{policies[p.key].options}{suffix}" for p in unit.parameters}
    if unit.rank == 0:
        parts = {} if part is None else {"parts": unit.layout.parts}
        for p in unit.parameters:
            record = _record(p, state.steps[p.key], policies[p.key], options[p.key])
            share.parameters[names[p.key]] = record | parts
    share.layouts |= _layouts(state, options, form)
    share.items += _items(state, names, {p.key: p.shape for p in unit.parameters}, form)


def _add_waiting(share: Share, optimizer: BlockOptimizer, form: Form) -> None:
    """Add the parameters without a unit, and their loaded state, if any, which is written again."""
    waiting = optimizer.state_keeper.waiting
    in_units = {p.key for unit in optimizer.units for p in unit.parameters}
    known = {e.parameter.key: e.parameter for e in optimizer.entries if e.parameter.key not in in_units}
    names = {key: stored_name(key, None) for key in known}
    options = {key: str(optimizer.policies[key].options) for key in known}
    steps = {} if waiting is None else waiting.steps
    for key, parameter in known.items():
        share.parameters[names[key]] = _record(parameter, steps.get(key, 0), optimizer.policies[key], options[key])
    if isinstance(waiting, StoredState):
        _add_stored(share, waiting, known)
    elif waiting is not None:
        state = waiting.everything()
        share.layouts |= _layouts(state, options, form)
        share.items += _items(state, names, {key: parameter.shape for key, parameter in known.items()}, form)


def _add_stored(share: Share, waiting: StoredState, known: Mapping[str, Parameter]) -> None:
    """Add stored state to be written again unchanged, independent of this save's groups and dtypes."""
    directory = waiting.manifest.directory
    used = set()
    for name, record in waiting.manifest.parameters.items():
        key = base_key(name)
        if key in waiting.keys:
            options = _of_save(record["options"], directory)
            share.parameters[name] = {**record, "group": known[key].group, "options": options, **_nothing_written()}
            used.add(options)
    for found, layout in waiting.manifest.layouts.items():
        saved_options, _, shape = found.rpartition(":")
        options = _of_save(saved_options, directory)
        if options in used:
            share.layouts[f"{options}:{shape}"] = layout
    share.items += waiting.items()


def _of_save(options: str, directory: str) -> str:
    """The options number in layout keys for blocks that an earlier save has written."""
    return options if " of " in options else f"{options} of {directory}"


def _record(parameter: Parameter, steps: int, policy: Policy, options: str) -> dict[str, Any]:
    blocks = policy.reason is None
    return {
        "shape": list(parameter.shape),
        "group": parameter.group,
        "options": options,
        "steps": steps,
        "merged": list(policy.merged) if blocks else None,
        "cuts": [list(along) for along in policy.cuts] if blocks else None,
        "decays": policy.decays,
        **_nothing_written(),
    }


def _nothing_written() -> dict[str, Any]:
    return {"blocks": [], "tensors": {}}


def _layouts(state: SavedState, options: Mapping[str, str], form: Form) -> dict[str, BlockLayout]:
    """The layouts of a state's blocks, by the options of their parameters and their shape."""
    layouts = [block_layout(stack, form) for stack in state.stacks]
    found = {}
    for stack, layout in zip(state.stacks, layouts, strict=True):
        for number in {options[key.rpartition("/")[0]] for key in stack.keys}:
            found[layout_key(number, stack.shape)] = layout
    return found


def _items(
    state: SavedState, names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], form: Form
) -> Iterable[Item]:
    """The tensors of a state to write; `stored_state` describes their keys.

    Args:
        names: stored names, by parameter key.
        shapes: of the parameters, by key.
    """
    for stack in state.stacks:
        layout = block_layout(stack, form)
        tensors = stored_form(layout)
        for row, key in enumerate(stack.keys):
            parameter, _, index = key.rpartition("/")
            place = Place(names[parameter], int(index))
            yield Item(place, tensors, partial(stored_tensors, stack, row, layout))
    for part in state.elementwise:
        dtypes = {moment: form.dtype(moment, tensor) for moment, tensor in sorted(part.tensors.items())}
        for key, elements, where in part.ranges():
            for moment, dtype in dtypes.items():
                values = part.tensors[moment][slice(*where)]
                place = Place(names[key], f"elementwise/{moment}", Box((elements.start,), (values.numel(),)))
                made = partial(values.to, dtype)
                yield Item(place, (("", dtype, (values.numel(),)),), made)
    for found in state.buffers:
        dtype = form.dtype(found.kind, found.buffer)
        for key, placed in found.places():
            place = Place(names[key], f"shards/{found.kind}", placed.box)
            made = partial(view_of(found.buffer, placed).to, dtype)
            yield Item(place, (("", dtype, placed.box.lengths),), made)


def _attempt(function: Callable[[], Any]) -> Future[Any]:
    """Call a function now; ``result()`` gives what it returned or raises what it raised."""
    future: Future[Any] = Future()
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)
    return future


def write_checkpoint(path: Path, share: Future[Share], group: dist.ProcessGroup | None) -> None:
    """Write the shares of all ranks.

    Raises:
        CheckpointError: on all ranks, if one of them fails or could not make its share, or if another job is saving
            into the folder.
    """
    lock: list[FolderLock] = []  # on the first rank, which holds it for all
    try:
        with on_all_ranks(group):
            own = share.result()
        directory = path / decide_on_first_rank(None, lambda _: _new_folder(path, lock), group)
        try:
            leave = set(decide_on_first_rank(sizes(own.items), _written_by_others, group)[_rank(group)])
            with on_all_ranks(group):
                items = [item for number, item in enumerate(own.items) if number not in leave]
                written, size = write(items, directory, _rank(group)) if items else ([], 0)
            sent = replace(own, items=[], written=written, bytes=size)
            decide_on_first_rank(sent, lambda found: _complete(path, directory, found, lock), group)
        except BaseException:
            if lock and _not_in_use(path, directory):
                shutil.rmtree(directory, ignore_errors=True)
            raise
    except Exception as error:
        raise CheckpointError(f"{path} cannot be written: {str(error) or repr(error)}") from error
    finally:
        for held in lock:
            held.release()


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _new_folder(path: Path, lock: list[FolderLock]) -> str:
    """Lock the checkpoint's folder, and make one for this save's data in it."""
    path.mkdir(parents=True, exist_ok=True)
    lock.append(FolderLock.acquire(path))
    folder = f"data-{uuid.uuid4().hex[:12]}"  # must match _OURS
    (path / folder).mkdir()
    return folder


def _written_by_others(ranks: Sequence[Sequence[tuple[Place, int]]]) -> list[list[int]]:
    """For each rank the numbers of its items that another rank writes: one writes what several hold, by load."""
    holders: dict[Place, list[tuple[int, int]]] = {}
    for rank, offers in enumerate(ranks):
        for number, (place, _) in enumerate(offers):
            holders.setdefault(place, []).append((rank, number))
    loads, leave = [0] * len(ranks), [list[int]() for _ in ranks]
    for _, found in sorted(holders.items(), key=lambda holder: len(holder[1])):  # those without a choice first
        writer, own = min(found, key=lambda place: loads[place[0]])
        loads[writer] += ranks[writer][own][1]
        for rank, number in found:
            if rank != writer:
                leave[rank].append(number)
    return leave


def _complete(path: Path, directory: Path, shares: Sequence[Share], lock: Sequence[FolderLock]) -> None:
    """Put the manifest of all ranks' shares in place, and remove what it has replaced."""
    manifest = _joined(shares, directory.name)
    unseen = sorted(name for name in manifest.files if not (directory / name).is_file())
    if unseen:
        raise CheckpointError(
            f"{', '.join(unseen[:3])} of other ranks cannot be seen here: all ranks must share the folder"
        )
    sync_directory(directory)
    for held in lock:
        held.check()
    write_manifest(manifest, path)
    _remove_replaced(path, manifest.directory)
    for held in lock:
        held.release()


def _joined(shares: Sequence[Share], directory: str) -> Manifest:
    """The manifest of all ranks' shares."""
    parameters: dict[str, Any] = {}
    for share in shares:
        for name, record in share.parameters.items():
            if name not in parameters or record["steps"] > parameters[name]["steps"]:
                parameters[name] = record
    # A rank that has not stepped a parameter yet does not know its expert-parallel part.
    whole = {base_key(name) for name in parameters if "@" in name and base_key(name) != name and name[-1] != "@"}
    records = {name: record for name, record in sorted(parameters.items()) if name not in whole}
    _add_written(records, shares)
    return Manifest(
        directory=directory,
        world_size=len(shares),
        rejected_steps=max(share.rejected_steps for share in shares),
        groups={number: options for share in shares for number, options in share.groups.items()},
        parameters=records,
        layouts={key: layout for share in shares for key, layout in share.layouts.items()},
        files={file_name(rank): {"bytes": share.bytes} for rank, share in enumerate(shares) if share.written},
        versions=_versions(),
        kept_by_others={number: kept for share in shares for number, kept in share.kept_by_others.items()},
    )


def _versions() -> dict[str, str]:
    """The versions that a manifest records."""
    return {"shampoo_deepspeed": __version__, "torch": str(torch.__version__)}


def _add_written(records: Mapping[str, dict[str, Any]], shares: Sequence[Share]) -> None:
    """Add to the parameters' records where all ranks have written their state, and the checksums."""
    for rank, found in in_order([share.written for share in shares]):
        place, record = found.place, records.get(found.place.parameter)
        if record is None:
            raise CheckpointError(f"a rank has written {place}, and no rank knows that parameter")
        if place.box is None:
            if place.part != len(record["blocks"]):
                raise CheckpointError(f"block {len(record['blocks'])} of {place.parameter!r} is on no rank, or on two")
            record["blocks"].append([rank, found.checksums])
        else:
            boxes = record["tensors"].setdefault(place.part, {"dtype": found.dtype, "boxes": []})["boxes"]
            boxes.append([rank, list(place.box.offsets), list(place.box.lengths), found.checksums])


def _not_in_use(path: Path, directory: Path) -> bool:
    """Whether the manifest in place is that of another save; False if it cannot be read, so that files stay."""
    try:
        if not (path / MANIFEST).exists():
            return True
        return Manifest.read(path).directory != directory.name
    except (CheckpointError, OSError):
        return False


# What a save creates in a checkpoint's folder, apart from the manifest; other files there are left alone.
_OURS = re.compile(r"(manifest\.json\.)?data-[0-9a-f]{12}")


def _remove_replaced(path: Path, directory: str) -> None:
    """Remove files of earlier saves. The new save is complete, so a failure to do so is only logged."""
    try:
        replaced = [found for found in path.iterdir() if _OURS.fullmatch(found.name) and found.name != directory]
    except OSError as error:
        shown = printable(str(path)), printable(str(error))
        logger.warning("the files of earlier saves in %s could not be removed: %s", *shown)
        return
    for old in replaced:
        try:
            if old.is_dir() and not old.is_symlink():
                shutil.rmtree(old)
            else:
                old.unlink()
        except OSError as error:
            shown = printable(str(old)), printable(str(error))
            logger.warning("%s is from an earlier save and could not be removed: %s", *shown)
