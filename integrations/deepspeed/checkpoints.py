"""DeepSpeed's own checkpoints: Shampoo's state is saved next to their files, in ``<dir>/<tag>/shampoo``.

DeepSpeed's files then hold the options, and the id and path of that state. When DeepSpeed converts a checkpoint for
another number of ranks (``ds_to_universal``), it keeps only flat moments and ``param_groups``. So the moments are
placeholders, and ``param_groups`` hold the id by which the state is found again. File names below are DeepSpeed's
(0.19.8).
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shampoo_deepspeed.checkpoint import load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.errors import CheckpointError, printable
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.distributed.collectives import first_rank_that, job_group, object_of_rank
from shampoo_deepspeed.state.state_dict import START_ANEW, SavedState
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer

if TYPE_CHECKING:
    from .engine import Engine

logger = logging.getLogger("shampoo_deepspeed")

FOLDER = "shampoo"
PLACE = "SHAMPOO_CHECKPOINT"  # an environment variable: the state's folder, if it was moved away from DeepSpeed's files
MARKER = "shampoo_checkpoint"  # key in param_groups
PLACEHOLDERS = ("exp_avg", "exp_avg_sq")
SAVED_BY = "DeepSpeed"  # in the note that says where the state is; notes of other frameworks have other keys

_LOADING: list[BlockOptimizer] = []


def wrap_checkpointing(engine: Engine) -> None:
    """Make an engine's ``save_checkpoint`` and ``load_checkpoint`` include the state of its optimizer."""
    reference = weakref.ref(engine)
    save, load = type(engine).save_checkpoint, type(engine).load_checkpoint

    @wraps(save)
    def save_checkpoint(save_dir: str, tag: object = None, *args: Any, **kwargs: Any) -> object:
        itself = reference()
        assert itself is not None
        if not save_dir:
            return save(itself, save_dir, tag, *args, **kwargs)
        tag = f"global_step{itself.global_steps}" if tag is None else str(tag)
        # Shampoo's state comes first: DeepSpeed then writes its files and, last of all, `latest`.
        where = _saved(itself.basic_optimizer, Path(save_dir) / tag)
        with itself.basic_optimizer.with_external_state(where), _convertible(itself, where):
            return save(itself, save_dir, tag, *args, **kwargs)

    @wraps(load)
    def load_checkpoint(*args: Any, **kwargs: Any) -> tuple[str | None, object]:
        itself = reference()
        assert itself is not None
        optimizer = itself.basic_optimizer
        given = inspect.signature(load).bind(itself, *args, **kwargs).arguments
        before = [dict(group) for group in optimizer.param_groups] if itself.load_universal_checkpoint() else []
        with _loading(optimizer):
            result = load(itself, *args, **kwargs)
        if given.get("load_optimizer_states", True) and not given.get("load_module_only", False):
            resume(optimizer, Path(result[0]).parent if result[0] else None, again=True)
        else:
            _leave_out(optimizer, before)
        return result

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def is_loading(optimizer: BlockOptimizer) -> bool:
    """Whether a wrapped ``load_checkpoint`` is loading for this optimizer, and will resume it."""
    return any(found is optimizer for found in _LOADING)


@contextmanager
def _loading(optimizer: BlockOptimizer) -> Iterator[None]:
    _LOADING.append(optimizer)
    try:
        yield
    finally:
        _LOADING.pop()


def resume(optimizer: BlockOptimizer, folder: Path | None = None, again: bool = False) -> None:
    """Load the state to which DeepSpeed's loaded files refer, if they do; call it on all ranks.

    Args:
        folder: the folder of the loaded files, if it is known.
        again: load even if the optimizer has built step units since the files were loaded.

    Raises:
        CheckpointError: if the state is missing and `START_ANEW` is not set; each later step raises it again.
    """
    marks = _taken_marks(optimizer)
    where = marks[0] if marks else optimizer.external_state  # external_state may be left from a failed load
    if where is None or not _is_ours(where):
        _refuse_moments(optimizer)
        return
    overwritten = _set_groups_apart(optimizer)
    _drop_placeholders(optimizer)
    if optimizer.external_state is None and optimizer.units and not again:
        return  # DeepSpeed steps one group after the other, and this is not the first one
    near = folder or where.get("folder")
    optimizer.external_state = where if near is None else {**where, "folder": str(near)}
    found, reasons = _found(where, near)
    group = job_group()
    without = first_rank_that(found is None, group)
    if without is None:
        assert found is not None
        load_shampoo(optimizer, found, options=overwritten)
        return
    missing = object_of_rank(without, reasons, group)
    if os.environ.get(START_ANEW) == "1":
        logger.warning("%s; Shampoo starts with new state (%s = 1)", printable(missing), START_ANEW)
        optimizer.take_state(SavedState())
    else:
        raise CheckpointError(
            f"{missing}. Put the checkpoint's folder {FOLDER!r} back, give its path in the environment variable "
            f"{PLACE}, load with load_optimizer_states=False, or set {START_ANEW}=1 to continue with new state"
        )


def note_folder(optimizer: BlockOptimizer, folder: Path | None) -> None:
    """Remember the folder for `resume`; called while DeepSpeed loads a state dict."""
    _taken_marks(optimizer)
    if folder is not None and optimizer.external_state is not None and _is_ours(optimizer.external_state):
        optimizer.external_state = {**optimizer.external_state, "folder": str(folder)}


def _saved(optimizer: BlockOptimizer, folder: Path) -> dict[str, str]:
    """Write the state, and return a note with its id and path."""
    resume(optimizer)
    path = folder.absolute() / FOLDER
    save_shampoo(optimizer, path)
    saved = object_of_rank(0, Manifest.read(path).directory if dist.get_rank() == 0 else "", job_group())
    return {"saved_by": SAVED_BY, "id": saved, "path": str(path)}


def _is_ours(where: Mapping[str, Any] | None) -> bool:
    return where is not None and where.get("saved_by") == SAVED_BY


@contextmanager
def _convertible(engine: Engine, where: Mapping[str, str]) -> Iterator[None]:
    """While DeepSpeed saves, provide what its converter demands, and the marks that it keeps.

    At stages 1 to 3 it demands flat moments and a step of every partition, and a note in the model's file
    (ds_to_universal.py). The moments are placeholders that take one byte on disk.
    """
    optimizer, stage = engine.basic_optimizer, int(engine.zero_optimization_stage())
    if stage == 0:  # saved unsharded, so any number of ranks can load it
        yield
        return
    before: dict[Tensor, dict[str, Any]] = {}
    for tensor in _partitions(engine, stage):
        before[tensor] = dict(optimizer.state.get(tensor, {}))
        nothing = torch.zeros(1, dtype=torch.uint8, device="cpu").expand(tensor.numel())
        step = before[tensor].get("step", torch.zeros((), dtype=torch.float32, device="cpu"))
        optimizer.state[tensor] = {"step": step, **dict.fromkeys(PLACEHOLDERS, nothing)}
    for group in optimizer.param_groups:
        group[MARKER] = dict(where)
    try:
        with _convertible_model(engine.module, stage < 3 and engine.zero_round_robin_gradients()):
            yield
    finally:
        _taken_marks(optimizer)
        for tensor, state in before.items():
            optimizer.state[tensor] = state
            if not state:
                del optimizer.state[tensor]


@contextmanager
def _convertible_model(module: nn.Module, round_robin: bool) -> Iterator[None]:
    """Add the note of ``ds_to_universal --inject_missing_state``, or one that makes the converter refuse."""
    names = sys.modules["deepspeed.checkpoint.constants"]
    key = names.UNIVERSAL_CHECKPOINT_INFO
    if getattr(module, key, None) is not None:
        yield
        return
    note: dict[str, Any] = {names.UNIVERSAL_CHECKPOINT_VERSION_KEY: names.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
    if round_robin:
        reason = "it was saved with round_robin_gradients = true, for which DeepSpeed converts weights wrongly"
        note[names.AUTOTP_UNSUPPORTED_PARAMETER_PATTERNS] = {"this checkpoint": reason}
    setattr(module, key, note)
    try:
        yield
    finally:
        delattr(module, key)


def _partitions(engine: Engine, stage: int) -> Sequence[Tensor]:
    """Return the flat tensors whose state DeepSpeed saves; ZeRO-3 has them in ``param_groups`` only while it saves."""
    if stage == 3:
        return engine.optimizer.fp32_partitioned_groups_flat
    return [tensor for group in engine.basic_optimizer.param_groups for tensor in group["params"]]


def _taken_marks(optimizer: BlockOptimizer) -> list[dict[str, str]]:
    return [group.pop(MARKER) for group in optimizer.param_groups if MARKER in group]


def _set_groups_apart(optimizer: BlockOptimizer) -> bool:
    """Undo that ZeRO-3 gives all groups the options of the first one (stage3.py); return whether it had."""
    numbers = sorted({entry.parameter.group for entry in optimizer.entries})
    now = [group["shampoo_group"] for group in optimizer.param_groups]
    if len(now) != len(numbers) or now == numbers:
        return False
    optimizer.groups_apart(numbers)
    return True


def _refuse_moments(optimizer: BlockOptimizer) -> None:
    """Raise an error or warn if DeepSpeed has loaded another optimizer's universal checkpoint.

    That is the case if there are moments without a note of ours.

    Raises:
        CheckpointError: if `START_ANEW` is not set.
    """
    if not any(name in state for state in _states(optimizer) for name in PLACEHOLDERS):
        return
    if os.environ.get(START_ANEW) != "1":
        raise CheckpointError(
            "the universal checkpoint was not saved by Shampoo. To continue another optimizer's run with Shampoo, "
            f"load with load_optimizer_states=False, or set the environment variable {START_ANEW}=1"
        )
    logger.warning(
        "the universal checkpoint is not Shampoo's (%s = 1): Shampoo starts with new state and the options given",
        START_ANEW,
    )
    _drop_placeholders(optimizer)
    optimizer.groups_apart([group["shampoo_group"] for group in optimizer.param_groups])


def _states(optimizer: BlockOptimizer) -> list[dict[str, Any]]:
    """Return the states of tensors; users may keep anything under keys of their own."""
    return [state for key, state in optimizer.state.items() if isinstance(key, Tensor)]


def _drop_placeholders(optimizer: BlockOptimizer) -> None:
    """Remove loaded placeholders; DeepSpeed has made dense tensors and fragments of them (tensor_fragment.py)."""
    for state in _states(optimizer):
        for name in PLACEHOLDERS:
            state.pop(name, None)
    for entry in optimizer.entries:
        fragments = getattr(getattr(entry.reference(), "_hp_mapping", None), "optim_fragment", None) or {}
        for name in PLACEHOLDERS:
            fragments.pop(name, None)


def _leave_out(optimizer: BlockOptimizer, groups: Sequence[Mapping[str, Any]]) -> None:
    """Keep the present state after a load without optimizer states.

    DeepSpeed loads those of a universal checkpoint nevertheless, so they are removed.

    Args:
        groups: the param groups before a universal checkpoint was loaded; empty for other checkpoints.
    """
    optimizer.external_state = None
    if groups:
        _drop_placeholders(optimizer)
        for group, before in zip(optimizer.param_groups, groups, strict=True):
            for name in set(group) - set(before):
                del group[name]
            group.update(before, params=group["params"])


def _found(where: Mapping[str, Any], folder: str | Path | None) -> tuple[Path | None, str]:
    """Return the folder that holds the state with this id, or None and where it was searched."""
    candidates = []
    if os.environ.get(PLACE):
        candidates += [Path(os.environ[PLACE]), Path(os.environ[PLACE]) / FOLDER]
    if folder is not None:
        candidates += [Path(folder) / FOLDER, *sorted(Path(folder).absolute().parent.glob(f"*/{FOLDER}"))]
    candidates.append(Path(where["path"]))
    reasons = {}
    for path in candidates:
        try:
            found = Manifest.read(path).directory
        except CheckpointError as error:
            reasons[path] = str(error)
            continue
        if found == where["id"]:
            return path, ""
        reasons[path] = f"{path} holds another save ({found})"
    return None, f"Shampoo's state {where['id']} of this DeepSpeed checkpoint is missing: {'; '.join(reasons.values())}"
