"""Checkpoints of the Hugging Face Trainer and of accelerate, with Shampoo's state in a subfolder.

Their own optimizer files are written by one rank, or by tools that only handle tensors in the shape of parameters. So
every rank writes the blocks that it owns by ``save_shampoo``, and those files hold only the options and a note of where
the state is. DeepSpeed needs nothing from this file (see ``deepspeed/checkpoints.py``).
"""

from __future__ import annotations

import json
import logging
import os
import re
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.state import DistributedType
from torch import nn
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.errors import printable
from shampoo_deepspeed.checkpoint.manifest import open_checkpoint
from shampoo_deepspeed.state.state_dict import SavedState
from shampoo_deepspeed.state.stateful_optimizer import BlockOptimizer
from shampoo_deepspeed.state.unwrap import inner_optimizer, unwrap

if TYPE_CHECKING:
    from transformers import Trainer as _BeforeATrainer
else:
    _BeforeATrainer = object  # the class after it among a user's bases is the Trainer

logger = logging.getLogger("shampoo_deepspeed")

__all__ = ["add_to_save_state"]

FOLDER = "shampoo"
TRAINER_STATE = "trainer_state.json"


class TrainerCheckpoints(_BeforeATrainer):
    """Part of ``ShampooTrainerMixin``: ``checkpoint-N/shampoo`` is written first, ``trainer_state.json`` last."""

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as the Trainer does, but resume from the newest complete checkpoint if ``True`` is given.

        Raises:
            ValueError: if there are checkpoints but none is complete.
        """
        if resume_from_checkpoint is True:
            assert self.args.output_dir is not None  # TrainingArguments fill it in
            resume_from_checkpoint = newest_complete(self.args.output_dir) or True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Save a checkpoint; if its folder exists already, mark it as incomplete until everything is written."""
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            (folder / TRAINER_STATE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = inner_optimizer(self.optimizer)
        if self.is_deepspeed_enabled or not isinstance(optimizer, Shampoo):
            return super()._save_optimizer_and_scheduler(output_dir)
        save_shampoo(optimizer, Path(output_dir) / FOLDER)
        with optimizer.with_external_state({"folder": FOLDER}):
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        optimizer = inner_optimizer(self.optimizer)
        folder = Path(checkpoint, FOLDER) if checkpoint is not None else None
        if folder is None or not folder.is_dir() or self.is_deepspeed_enabled or not isinstance(optimizer, Shampoo):
            return super()._load_optimizer_and_scheduler(checkpoint)
        with optimizer.with_external_state({"folder": str(folder)}):
            super()._load_optimizer_and_scheduler(checkpoint)
        load_shampoo(optimizer, folder)


def add_to_save_state(accelerator: Accelerator, optimizer: object) -> None:
    """Make ``accelerator.save_state`` and ``load_state`` include Shampoo's state, in a subfolder ``shampoo``.

    Call this function after ``accelerator.prepare``; ``prepare`` of this package does so. As always with accelerate,
    call ``save_state`` and ``load_state`` on all ranks. A second Shampoo's folder is ``shampoo_1``, and so on, in the
    order of these calls. An optimizer that ``accelerator.free_memory()`` has dropped no longer counts, and is not kept
    alive.

    Raises:
        TypeError: if the optimizer is not Shampoo.
    """
    inner = unwrap(optimizer)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return
    attached: list[_Attached] | None = getattr(accelerator.save_state, "attached", None)
    if attached is None:
        attached = _wrap_save_and_load(accelerator)
    if all(found.reference() is not inner for found in attached):
        attached.append(_Attached(weakref.ref(inner), inner))
    _included(accelerator, attached)


@dataclass
class _Attached:
    """A Shampoo that an accelerator saves; ``not_prepared`` keeps it alive until accelerate has prepared it."""

    reference: weakref.ref[BlockOptimizer]
    not_prepared: BlockOptimizer | None


def _included(accelerator: Accelerator, attached: list[_Attached]) -> dict[str, BlockOptimizer]:
    """Return what is saved and loaded now, by the names of the folders.

    A prepared optimizer counts as long as the accelerator has it, whether or not anything else keeps it alive, so that
    all ranks agree.
    """
    attached[:] = [found for found in attached if found.reference() is not None]
    prepared = {id(inner_optimizer(wrapper)) for wrapper in accelerator._optimizers}
    included = []
    for found in attached:
        optimizer = found.reference()
        if id(optimizer) in prepared:
            found.not_prepared = None
        if optimizer is not None and (id(optimizer) in prepared or found.not_prepared is not None):
            included.append(optimizer)
    return {f"{FOLDER}_{number}" if number else FOLDER: optimizer for number, optimizer in enumerate(included)}


def _wrap_save_and_load(accelerator: Accelerator) -> list[_Attached]:
    """Let ``save_state`` and ``load_state`` of an accelerator include the state of what the returned list holds."""
    save_state, load_state = accelerator.save_state, accelerator.load_state
    attached: list[_Attached] = []
    loaded_from: list[Path] = []

    def write(_: list[nn.Module], __: list[dict[str, Any]], output_dir: str) -> None:
        for name, optimizer in _included(accelerator, attached).items():
            save_shampoo(optimizer, Path(output_dir) / name)

    def note(_: list[nn.Module], input_dir: str) -> None:
        loaded_from.append(Path(input_dir))

    @wraps(save_state)
    def save(*args: Any, **kwargs: Any) -> Any:
        with _external(_included(accelerator, attached)):
            return save_state(*args, **kwargs)

    @wraps(load_state)
    def load(*args: Any, **kwargs: Any) -> None:
        loaded_from.clear()
        included = _included(accelerator, attached)
        with _external(included):
            load_state(*args, **kwargs)
        for name, optimizer in included.items():
            folder = loaded_from[-1] / _noted(optimizer, name)
            if folder.is_dir() or not optimizer.has_state:  # a single process may have saved without this hook
                load_shampoo(optimizer, folder)

    accelerator.register_save_state_pre_hook(write)
    accelerator.register_load_state_pre_hook(note)
    save.attached = attached  # type: ignore[attr-defined]
    accelerator.save_state = save  # type: ignore[method-assign]
    accelerator.load_state = load  # type: ignore[method-assign]
    return attached


@contextmanager
def _external(included: Mapping[str, BlockOptimizer]) -> Iterator[None]:
    """Let the state dicts of these optimizers say in which folders their state is."""
    with ExitStack() as stack:
        for name, optimizer in included.items():
            stack.enter_context(optimizer.with_external_state({"folder": name}))
        yield


def _noted(optimizer: BlockOptimizer, name: str) -> str:
    """Return the name of the folder that the loaded state dict says, if it says one; else the given name."""
    found = (optimizer.external_state or {}).get("folder")
    return found if isinstance(found, str) and re.fullmatch(rf"{FOLDER}(_\d+)?", found) else name


def check_resumed(optimizer: Shampoo, state: TrainerState, required: bool = True) -> None:
    """Raise an error or warn if training resumes with a fresh optimizer.

    Args:
        required: if False, only warn, and let the optimizer start with new state.

    Raises:
        CheckpointError: if the Trainer has resumed and the optimizer has not.
    """
    if not state.global_step or optimizer.has_state:
        return
    what = (
        f"the Trainer resumes from step {state.global_step}, but its checkpoint has no Shampoo state: it was saved "
        "with save_only_model=True, or files are missing, or it was written by ShampooTrainer (then it has a folder "
        f"{FOLDER!r}) and is read by another Trainer"
    )
    if required:
        raise CheckpointError(
            f"{what}. Resume with ShampooTrainer, or let the optimizer start with new state: set require_state to "
            "False on a ShampooCallback"
        )
    logger.warning("%s; the optimizer starts with new state", what)
    optimizer.take_state(SavedState())


def newest_complete(output_dir: str | os.PathLike[str]) -> str | None:
    """Return the newest complete ``checkpoint-N`` in a Trainer's folder, or None if there are no checkpoints.

    A warning names each newer, incomplete checkpoint.

    Raises:
        ValueError: if there are checkpoints but none is complete.
    """
    found = {}
    for path in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        match = re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    skipped = []
    for _, path in sorted(found.items(), reverse=True):
        problem = what_is_missing(path)
        if problem is None:
            return str(path)
        logger.warning("not resumed from %s: %s", printable(str(path)), printable(problem))
        skipped.append(f"{path.name}: {problem}")
    if skipped:
        raise ValueError(printable(f"no checkpoint in {output_dir} is complete ({'; '.join(skipped)})"))
    return None


def what_is_missing(checkpoint: Path) -> str | None:
    """Return why training cannot resume from a Trainer's checkpoint, or None. Its contents are not checked here."""
    try:
        json.loads((checkpoint / TRAINER_STATE).read_bytes())
    except (OSError, ValueError) as error:
        return f"its save was interrupted ({TRAINER_STATE}: {error})"
    latest = checkpoint / "latest"  # a file of DeepSpeed's that names the folder that its engine has written
    folder = checkpoint / latest.read_text().strip() if latest.is_file() else checkpoint
    if (folder / FOLDER).is_dir():
        return _cut_short(folder / FOLDER)
    if not latest.is_file() and not any(checkpoint.glob("optimizer*")):
        return "it holds no optimizer state, as with save_only_model=True"
    return None if folder.is_dir() else f"{folder} is missing"


def _cut_short(folder: Path) -> str | None:
    try:
        open_checkpoint(folder)
    except CheckpointError as error:
        return str(error)
    return None
