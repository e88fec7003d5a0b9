"""Writes a checkpoint on all ranks together: data first, then the manifest, whose appearance makes it complete."""

from __future__ import annotations

import logging
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from shampoo_deepspeed.checkpoint.manifest import NAME as MANIFEST
from shampoo_deepspeed.checkpoint.manifest import CheckpointError, Manifest, sync_directory
from shampoo_deepspeed.checkpoint.records import tables
from shampoo_deepspeed.checkpoint.stored_state import StoredState, base_key, state_items
from shampoo_deepspeed.checkpoint.tensor_store import INDEX, Item, StorageError, checksum, write
from shampoo_deepspeed.distributed.collectives import decided, gathered
from shampoo_deepspeed.state.block_codec import Form
from shampoo_deepspeed.state.state_dict import SavedState
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

logger = logging.getLogger("shampoo_deepspeed")


def prepared(
    optimizer: BlockOptimizer, form: Form, copies: bool
) -> tuple[list[Item], dict[str, Any], Exception | None]:
    """What this rank writes and tells, or why it cannot, which the other ranks must hear before they wait for it.

    Args:
        copies: of the tensors, on the CPU: the next step changes the live ones.
    """
    try:
        items = list(_items(optimizer, form))
        if copies:
            items = [replace(item, content=_constant(item.content())) for item in items]
        return items, tables(optimizer, form), None
    except Exception as error:
        return [], {}, error


def _constant(tensor: torch.Tensor) -> Any:
    copy = tensor.detach().cpu().clone()
    return lambda: copy


def _items(optimizer: BlockOptimizer, form: Form) -> Iterable[Item]:
    shapes = {entry.parameter.key: entry.parameter.shape for entry in optimizer.entries}
    for unit in optimizer.units:
        state = SavedState.of_units([unit], optimizer.rejected_steps)
        yield from state_items(state, shapes, unit.layout.part, form)
    waiting = optimizer.waiting_state
    if isinstance(waiting, StoredState):
        yield from waiting.items()
    elif waiting is not None:
        yield from state_items(waiting.everything(), shapes, None, form)


def write_checkpoint(
    path: Path,
    items: Sequence[Item],
    told: Mapping[str, Any],
    error: Exception | None,
    group: dist.ProcessGroup | None,
) -> None:
    """Write what the ranks have prepared; a rank that could not gives the error.

    Raises:
        CheckpointError: on all ranks, where one of them fails.
    """
    rank = 0 if group is None else dist.get_rank(group)
    words = None if error is None else str(error) or repr(error)
    problem = next((found for found in gathered(words, group) if found is not None), None)
    if problem is not None:
        raise CheckpointError(f"{path} cannot be written: {problem}") from error
    folder, problem = decided(None, lambda _: _new_folder(path), group)
    if problem:
        raise CheckpointError(f"{path} cannot be written: {problem}")
    directory = path / folder
    try:
        write(items, directory, group)
    except StorageError as error:
        if rank == 0:
            shutil.rmtree(directory, ignore_errors=True)
        raise CheckpointError(str(error)) from error
    problem = decided((told, *_facts(directory, rank)), lambda words: _completed(path, directory, words), group)
    if problem:
        raise CheckpointError(f"{path} cannot be written: {problem}")


def _completed(path: Path, directory: Path, everyones: Sequence[tuple[Mapping[str, Any], Any, str | None]]) -> Any:
    """Make complete what all ranks have written, or remove it; gives what went wrong."""
    problem = next((found for _, _, found in everyones if found), None)
    try:
        problem = problem or _commit(path, directory, [(told, files) for told, files, _ in everyones])
    except Exception as error:  # whatever it is, the other ranks wait for this one's word
        problem = repr(error)
    if problem and _not_in_use(path, directory):
        shutil.rmtree(directory, ignore_errors=True)
    return problem


def _not_in_use(path: Path, directory: Path) -> bool:
    """Whether the manifest in place is of another save; where that cannot be said, what is there stays."""
    try:
        if not (path / MANIFEST).exists():
            return True
        return Manifest.read(path).directory != directory.name
    except (CheckpointError, OSError):
        return False


def _facts(directory: Path, rank: int) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Size and checksum of each file that this rank has written, and what went wrong."""
    try:
        own = [*directory.glob(f"__{rank}_*"), *([directory / INDEX] if rank == 0 else [])]
        return {file.name: {"bytes": file.stat().st_size, "crc32": checksum(file)} for file in own}, None
    except Exception as error:  # as above
        return {}, f"what was written cannot be read: {error}"


def _new_folder(path: Path) -> tuple[str | None, str | None]:
    try:
        folder = f"data-{uuid.uuid4().hex[:12]}"  # as _OURS knows it
        (path / folder).mkdir(parents=True)
    except Exception as error:  # as above
        return None, str(error)
    return folder, None


def _commit(
    path: Path, directory: Path, everyones: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> str | None:
    """Write the manifest and remove what it has replaced; gives what went wrong."""
    parameters: dict[str, Any] = {}
    for told, _ in everyones:
        for name, record in told["parameters"].items():
            if name not in parameters or record["steps"] > parameters[name]["steps"]:
                parameters[name] = record
    # A rank that has not met a parameter yet knows nothing of its parts.
    whole = {base_key(name) for name in parameters if base_key(name) != name and not name.endswith("@")}
    manifest = Manifest(
        directory=directory.name,
        world_size=len(everyones),
        rejected_steps=max(told["rejected_steps"] for told, _ in everyones),
        groups={number: options for told, _ in everyones for number, options in told["groups"].items()},
        parameters={name: record for name, record in sorted(parameters.items()) if name not in whole},
        layouts={key: layout for told, _ in everyones for key, layout in told["layouts"].items()},
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
    try:
        replaced = [found for found in path.iterdir() if _OURS.fullmatch(found.name) and found.name != directory]
    except OSError as error:
        logger.warning("what earlier saves have left in %s could not be removed: %s", path, error)
        return
    for old in replaced:
        try:
            if old.is_dir():
                shutil.rmtree(old)
            else:
                old.unlink()
        except OSError as error:
            logger.warning("%s is of an earlier save and could not be removed: %s", old, error)
