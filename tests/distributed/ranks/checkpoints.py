"""What a rank does in the checks of checkpoints: trains, is stopped, resumes, and returns losses and parameters."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import Tensor
from transformers import Trainer, TrainingArguments

from shampoo_deepspeed import CheckpointError, Shampoo
from shampoo_deepspeed.integrations.accelerate import prepare
from shampoo_deepspeed.integrations.trainer import (
    ShampooCallback,
    ShampooFactory,
    ShampooTrainer,
    ShampooTrainerMixin,
    deferred,
)
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.distributed.ranks.torch_helpers import OPTIONS
from tests.distributed.ranks.trainer import clean_process, full_parameters, logged, shared_folder
from tests.distributed.ranks.trainer_optimizers import Losses, pretend_to_have_accelerators, whole
from tests.support import zoo
from tests.support.trainings import Training, make_data, make_model

TRAINING = Training(steps=7, options={"momentum": 0.5})  # refreshes at 1, 3, 6
STOP, SAVED = 6, 4


class Killed(Exception):
    pass


class Dies:
    """A mixin for a Trainer that dies, either in the middle of a save ("save") or in a step between two saves ("step").

    In the middle of a save, the optimizer's part is written already.
    """

    dies = ""

    def _save_rng_state(self: Any, output_dir: str) -> None:
        if self.dies == "save" and self.state.global_step == STOP:
            raise Killed
        super()._save_rng_state(output_dir)  # type: ignore[misc]

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.dies == "step" and self.state.global_step == STOP - 1:
            raise Killed
        return loss


class DyingShampooTrainer(Dies, ShampooTrainer):
    pass


class DyingTrainer(Dies, Trainer):
    pass


class OfAUser(Trainer):
    """A user's Trainer, with its own loss."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(*args, **kwargs)
        return 2.0 * loss


class DyingMixed(Dies, ShampooTrainerMixin, OfAUser):
    pass


@dataclass(frozen=True)
class Run:
    """A Trainer ("ours", "mixed" into a user's, or "stock"), a framework, and how FSDP writes state dicts."""

    trainer: str
    framework: str
    form: str = "FULL_STATE_DICT"


@dataclass
class Seen:
    losses: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


def trained(run: Run) -> dict[str, Any]:
    """Return the results of three runs: uninterrupted, killed in the last save or between two saves, and resumed."""
    dies = dies_in(run)
    with shared_folder() as folder, logged() as messages:
        uninterrupted, _ = train_once(run, folder / "a", saves=False)
        killed, _ = train_once(run, folder / "b", dies=dies)
        dist.barrier()
        left = sorted(path.name for path in (folder / "b").iterdir())
        parts = sorted(path.name for path in (folder / f"b/checkpoint-{SAVED}").iterdir())
        last = True if run.trainer != "stock" or dies == "step" else str(folder / f"b/checkpoint-{SAVED}")
        resumed, error = train_once(run, folder / "b", resume=last)
        return {
            "uninterrupted": uninterrupted, "killed": killed, "resumed": resumed, "error": error, "left": left,
            "parts": parts, "messages": messages, "finally": sorted(path.name for path in (folder / "b").iterdir()),
        }  # fmt: skip


def dies_in(run: Run) -> str:
    """Return where a run dies: a stock Trainer cannot tell whether the newest checkpoint is complete, so it must be."""
    return "step" if run.trainer == "stock" and run.framework.startswith("zero") else "save"


def robbed(run: Run) -> str:
    """Return the error of a Trainer that resumes from a checkpoint without Shampoo's folder."""
    with shared_folder() as folder:
        train_once(run, folder, dies=dies_in(run))
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(folder / f"checkpoint-{SAVED}/shampoo")
        dist.barrier()
        return train_once(run, folder, resume=str(folder / f"checkpoint-{SAVED}"))[1]


def train_once(run: Run, folder: Path, saves: bool = True, dies: str = "", resume: Any = None) -> tuple[Seen, str]:
    with clean_process():
        callback, seen, error = Losses(), Seen(), ""
        trainer = made_trainer(run, folder, saves, callback)
        trainer.dies = dies
        try:
            trainer.train(resume_from_checkpoint=resume)
        except Killed:
            error = "killed"
        except (RuntimeError, CheckpointError) as raised:
            return seen, str(raised)
        zero = run.framework.startswith("zero")
        seen.losses, seen.parameters = callback.losses, (full_parameters if zero else whole)(trainer.model)
        if zero:
            trainer.model_wrapped.destroy()
        return seen, error


def made_trainer(run: Run, folder: Path, saves: bool, callback: ShampooCallback) -> Any:
    common = TRAINING.arguments(dist.get_world_size()) | {
        "save_strategy": "steps" if saves else "no", "save_steps": 2, "save_total_limit": 2,
    }  # fmt: skip
    if run.framework.startswith("fsdp"):
        config = {"version": int(run.framework[4]), "sync_module_states": False, "state_dict_type": run.form}
        config["use_orig_params"] = run.framework != "fsdp1_flat"
        common |= {"fsdp": True, "fsdp_config": config}
    if run.framework.startswith("zero"):
        deepspeed.init_distributed("gloo")
        common["deepspeed"] = replace(TRAINING, stage=int(run.framework[4])).deepspeed_config()
        if run.trainer != "stock":
            del common["deepspeed"]["optimizer"]
    arguments = TrainingArguments(str(folder), **common)
    if run.framework.startswith("fsdp"):
        pretend_to_have_accelerators(arguments)
    given: dict[str, Any] = {"train_dataset": make_data(TRAINING.steps), "callbacks": [callback]}
    options = TRAINING.trainer_options() | TRAINING.own_options()
    if run.trainer == "stock":
        if not run.framework.startswith("zero"):  # DeepSpeed's JSON says it
            given["optimizer_cls_and_kwargs"] = (ShampooFactory, options)
        return DyingTrainer(make_model("llama"), arguments, **given)
    kind = DyingMixed if run.trainer == "mixed" else DyingShampooTrainer
    return kind(make_model("llama"), arguments, optimizers=(deferred(**options), None), **given)


def accelerated(run: Run) -> list[Seen]:
    """Return the results of an uninterrupted loop, and of one that resumes in another accelerator."""
    with shared_folder() as folder:
        return [loop(run, folder, "save"), loop(run, folder, "load")]


def loop(run: Run, folder: Path, what: str) -> Seen:
    with clean_process():
        plugin = None
        if run.framework.startswith("fsdp"):
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=int(run.framework[4]),
                state_dict_type=run.form,
                use_orig_params=True,
                sync_module_states=False,
            )
            pretend_to_have_accelerators(TrainingArguments(str(folder), use_cpu=True, report_to="none"))
        accelerator = Accelerator(cpu=plugin is None, fsdp_plugin=plugin)
        if what == "load":
            torch.manual_seed(7)  # other weights than those that are loaded
        model: Any = zoo.MODELS["wide"]() if what == "load" else zoo.make_model("wide")
        given = model, Shampoo(model.named_parameters(), **OPTIONS)
        model, optimizer = prepare(accelerator, *given) if run.trainer == "ours" else accelerator.prepare(*given)
        seen = Seen()
        if what == "load":
            accelerator.load_state(str(folder / "state"))
        for step in range(SAVED if what == "load" else 0, TRAINING.steps):
            if step == SAVED and what == "save":
                accelerator.save_state(str(folder / "state"))
            (piece,) = zoo.micro_batches(zoo.make_batch("wide", step), dist.get_rank(), dist.get_world_size())
            loss = model(**piece)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            seen.losses.append(loss.item())
        assert inner_optimizer(optimizer).has_state
        seen.parameters = whole(model)
        return seen
