"""save_shampoo and load_shampoo: sharded factor state that any world size and any framework can go on from.

A checkpoint is a folder with ``manifest.json`` and one ``data-<id>`` folder. Tensors are written first; the manifest,
put in place by one rename, makes the save complete; only then is the data of an earlier save removed.
"""

from __future__ import annotations

import atexit
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from shampoo_deepspeed.checkpoint.load import incompatibilities, restore_options, what_does_not_fit
from shampoo_deepspeed.checkpoint.manifest import CheckpointError, Manifest
from shampoo_deepspeed.checkpoint.save import prepared, write_checkpoint
from shampoo_deepspeed.checkpoint.stored_state import StoredState, base_key
from shampoo_deepspeed.checkpoint.tensor_store import Item, damage
from shampoo_deepspeed.distributed.collectives import decided, everyone
from shampoo_deepspeed.distributed.process_groups import exists
from shampoo_deepspeed.state.block_codec import Form
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer
from shampoo_deepspeed.state.unwrap import unwrap

logger = logging.getLogger("shampoo_deepspeed")


@dataclass(frozen=True)
class LoadReport:
    """What `load_shampoo` has found: keys of parameters that go on, and why others start anew."""

    loaded: tuple[str, ...]
    left_out: Mapping[str, str]


def save_shampoo(
    optimizer: Any,
    path: str | PathLike[str],
    *,
    asynchronous: bool = False,
    moments_dtype: torch.dtype | None = None,
    packed_factors: bool = False,
) -> Future[None]:
    """Write the optimizer's state into the folder ``path``; call it on all ranks of the job.

    Every rank writes the blocks that it owns, so the folder must be one that all ranks see. An earlier checkpoint in
    it stays until the new one is complete.

    Args:
        optimizer: a Shampoo, or what holds one: a wrapper of a framework, a DeepSpeed engine, a Trainer that trains.
        asynchronous: return once the state is copied aside on the CPU; a thread writes it, together with those of the
            other ranks. The next save waits for it, as does the interpreter's exit. Before
            ``dist.destroy_process_group()`` call ``result()`` of the future or `wait_for_saves`: without its process
            group a save cannot be completed.
        moments_dtype: dtype of moments on disk, e.g. torch.bfloat16, half the bytes and no longer bit-exact; None keeps
            theirs. Factor matrices, roots and master weights always keep theirs.
        packed_factors: write the lower triangles of factor matrices only, from which everything is computed: up to a
            sixth less on disk, and a run that resumes is the same to the bit. Packing takes a pass over the matrices.

    Returns:
        A future, which is done already unless ``asynchronous``.

    Raises:
        CheckpointError: on all ranks, where one of them fails (from ``result()`` of the future if asynchronous), or
            where a loaded state dict waits for ``load_shampoo``.
        TypeError: where there is no Shampoo in ``optimizer``.
        ValueError: for an empty path, and for another ``moments_dtype`` than bfloat16, float32 or float64. In float16
            second moments of small gradients would be 0, and the next steps without bound.
    """
    optimizer = unwrap(optimizer)
    if moments_dtype not in (None, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"moments_dtype = {moments_dtype} is not allowed: None, bfloat16, float32 or float64")
    _WRITER.wait(optimizer)
    if optimizer.external_state is not None:
        raise CheckpointError(
            f"the optimizer has no state yet: its loaded state dict says where it is "
            f"({dict(optimizer.external_state)}); call load_shampoo(optimizer, path) on all ranks first"
        )
    optimizer.finish_step()
    if not os.fspath(path):
        raise ValueError("path is empty: give the folder of the checkpoint")
    folder = Path(path).absolute()  # a loop may change its directory while a thread writes
    what = (folder, *prepared(optimizer, Form(moments_dtype, packed_factors), asynchronous), everyone(asynchronous))
    if not asynchronous:
        write_checkpoint(*what)
        _reopen(optimizer, folder)
        done: Future[None] = Future()
        done.set_result(None)
        return done
    future = _WRITER.submit(optimizer, *what)
    # The files that it waits in may be those that this save replaces, and the next step may read them.
    if _waits_in_files(optimizer) and future.exception() is None:
        _reopen(optimizer, folder)
    return future


def wait_for_saves() -> None:
    """Wait until no asynchronous save of this process is under way; call it before ``dist.destroy_process_group()``.

    Raises:
        CheckpointError: the first failure of a save, of whatever optimizer, that no other call has raised yet; it names
            the save's path. The log names those of further ones.
    """
    _WRITER.wait_for_all()


def load_shampoo(optimizer: Any, path: str | PathLike[str], *, strict: bool = True, options: bool = True) -> LoadReport:
    """Go on from a checkpoint, from the next step on; call it on all ranks. World size and framework may have changed.

    The files are checked now and read when the next step finds out what each rank owns; they must stay until then.

    Args:
        optimizer: as for ``save_shampoo``.
        strict: raise where anything does not fit. Otherwise parameters that fit go on, the others start anew, and the
            report and a warning name them.
        options: take over lr and the other options that a group may change at any time, as torch's
            ``load_state_dict`` does; those that shape the state must be equal already.

    Raises:
        CheckpointError: on all ranks: no complete checkpoint, a damaged file, or (strict) what does not fit.
        TypeError: where there is no Shampoo in ``optimizer``.
    """
    optimizer = unwrap(optimizer)
    _WRITER.wait(optimizer)
    # It is read later, when a loop may have changed its directory, or a link to its newest checkpoint.
    folder, group = Path(path).resolve(), everyone()
    manifest, problem = _checked_manifest(folder, group)
    known = [entry.parameter for entry in optimizer.entries]
    unfit = {} if manifest is None else incompatibilities(known, optimizer.policies, optimizer.configs(), manifest)
    directory = None if manifest is None else manifest.directory
    words = (problem, directory, [p.key for p in known], unfit)
    problem, left_out, here = decided(words, lambda everyones: _together(folder, everyones), group)
    if problem or manifest is None:
        raise CheckpointError(problem)
    saved = {base_key(name) for name in manifest.parameters}
    unused = {key: "it is in the checkpoint, and no parameter here has this name" for key in sorted(saved - here)}
    if strict and (left_out or unused):
        raise CheckpointError(what_does_not_fit(folder, {**left_out, **unused}))
    for key, why in {**left_out, **unused}.items():
        logger.warning("%s: %s; it starts anew", key, why)
    keys = frozenset((saved & {p.key for p in known}) - set(left_out))
    optimizer.take_state(StoredState(folder, manifest, keys))
    if options:
        restore_options(optimizer, manifest, keys)
    return LoadReport(tuple(sorted(keys)), {**left_out, **unused})


@dataclass
class _Writer:
    """The thread that writes, its saves that may be under way or whose failure is untold, and each optimizer's last."""

    thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="shampoo-save")
    )
    under_way: list[Future[None]] = field(default_factory=list)
    last: WeakKeyDictionary[BlockOptimizer, Future[None]] = field(default_factory=WeakKeyDictionary)

    def submit(self, optimizer: BlockOptimizer, *arguments: Any) -> Future[None]:
        """Let the thread write a checkpoint of an optimizer."""
        future = self.last[optimizer] = self.thread.submit(_written, *arguments)
        self.under_way.append(future)
        return future

    def wait(self, optimizer: BlockOptimizer) -> None:
        """Until nothing is being written: another optimizer's save may be into the same folder.

        Raises:
            CheckpointError: where the last save of this optimizer has failed; those of others are told by theirs.
        """
        wait(self.under_way)
        mine = self.last.pop(optimizer, None)
        self.under_way = [future for future in self.under_way if future is not mine and _failed(future)]
        if mine is not None:
            mine.result()

    def wait_for_all(self) -> None:
        """Until nothing is being written.

        Raises:
            CheckpointError: the first failure that was not told yet.
        """
        wait(self.under_way)
        failed = [future for future in self.under_way if _failed(future)]
        self.forget()
        if failed:
            failed[0].result()

    def forget(self) -> None:
        """All saves, and with their failures what those hold on to."""
        self.under_way.clear()
        self.last.clear()


def _failed(future: Future[None]) -> bool:
    return future.cancelled() or future.exception() is not None


def _written(
    path: Path,
    items: Sequence[Item],
    told: Mapping[str, Any],
    unprepared: Exception | None,
    group: dist.ProcessGroup | None,
) -> None:
    """What the thread does; a failure names the path and, where a script has ended too early, what it should do."""
    try:
        write_checkpoint(path, items, told, unprepared, group)
    except Exception as error:
        failure = error if isinstance(error, CheckpointError) else CheckpointError(f"{path} cannot be written: {error}")
        if group is not None and not exists(group):
            failure = CheckpointError(
                f"{path} is not complete: its process group was destroyed while a thread wrote it ({error}). Call "
                "shampoo_deepspeed.wait_for_saves(), or result() of the future, on all ranks before "
                "destroy_process_group()"
            )
        logger.error("the asynchronous save into %s has failed: %s", path, failure)
        raise failure from error


_WRITER = _Writer()
atexit.register(_WRITER.forget)  # the thread was joined before; a failure holds on to the process group


def _together(path: Path, everyones: Sequence[tuple[Any, ...]]) -> tuple[str | None, dict[str, str], set[str]]:
    """What is wrong with a checkpoint on any rank, what does not fit on any, and all keys of parameters."""
    problem = next((found for found, _, _, _ in everyones if found), None)
    seen = {directory for _, directory, _, _ in everyones}
    if problem is None and len(seen) > 1:
        problem = f"the ranks see different saves in {path} ({', '.join(sorted(seen))}): wait until it has settled"
    left_out = {key: why for _, _, _, reasons in everyones for key, why in reasons.items()}
    return problem, left_out, {key for _, _, keys, _ in everyones for key in keys}


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
