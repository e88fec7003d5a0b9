"""Checkpoints of the Trainer, accelerate and torch's helpers in one process, and the errors that they raise."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.optim import _NamedOptimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from shampoo_deepspeed import CheckpointError, LayoutError, Shampoo, ShampooConfig
from shampoo_deepspeed.integrations.checkpoints import add_to_save_state, newest_complete
from shampoo_deepspeed.integrations.trainer import ShampooCallback, ShampooFactory, ShampooTrainer, deferred
from shampoo_deepspeed.options.config import OPTION_NAMES
from shampoo_deepspeed.state.dcp_state import completed_group, robust_group
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.support.stepping import same_bits, shampoo, snapshot, state_of, train
from tests.support.trainings import Training, make_data, make_model
from tests.support.zoo import make_model as zoo_model

pytestmark = pytest.mark.slow

TRAINING = Training(steps=7, options={"momentum": 0.5})
OPTIONS = TRAINING.trainer_options() | TRAINING.own_options()
SAVED, STOP, KILLED = 4, 6, 9


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    """Reset accelerate's global state afterwards."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])


class Dying(ShampooTrainer):
    """A Trainer whose process ends in the middle of a save, when the optimizer's part is written."""

    def _save_rng_state(self, output_dir: str) -> None:
        if self.state.global_step == STOP:
            os._exit(KILLED)
        super()._save_rng_state(output_dir)


def trainer(
    folder: Path, kind: type[Trainer] = ShampooTrainer, *callbacks: TrainerCallback, **changes: Any
) -> tuple[Any, Losses]:
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2}
    arguments = TrainingArguments(str(folder), **TRAINING.arguments(1) | saving | changes)
    seen = Losses()
    given: dict[str, Any] = {"optimizers": (deferred(**OPTIONS), None)}
    if not issubclass(kind, ShampooTrainer):
        given = {"optimizer_cls_and_kwargs": (ShampooFactory, OPTIONS)}
    data = make_data(TRAINING.steps)
    return kind(make_model("llama"), arguments, train_dataset=data, callbacks=[seen, *callbacks], **given), seen


def die(folder: str) -> None:
    """Train in a process that dies."""
    torch.set_num_threads(1)
    trainer(Path(folder), Dying)[0].train()


def test_a_killed_and_resumed_training_is_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    code = f"from tests.integrations.test_checkpoints import die; die({str(tmp_path / 'killed')!r})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == KILLED, process.stderr
    assert newest_complete(tmp_path / "killed") == str(tmp_path / f"killed/checkpoint-{SAVED}")
    assert f"checkpoint-{STOP}: its save was interrupted (trainer_state.json" in caplog.text
    whole, uninterrupted = trainer(tmp_path / "whole")
    whole.train()
    again, resumed = trainer(tmp_path / "killed")
    again.train(resume_from_checkpoint=True)
    assert len(uninterrupted.losses) == TRAINING.steps
    assert resumed.losses == uninterrupted.losses[SAVED:]
    assert same_bits(snapshot(again.model.parameters()), snapshot(whole.model.parameters()))
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["checkpoint-6", "checkpoint-7"]
    assert (tmp_path / "killed/checkpoint-6/shampoo/manifest.json").is_file()
    third, from_a_path = trainer(tmp_path / "third")
    third.train(str(tmp_path / "whole/checkpoint-6"))
    assert from_a_path.losses == uninterrupted.losses[STOP:]


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_folders_that_are_not_resumed_from_are_printed_escaped(
    content: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Their path and what DeepSpeed's file names may hold anything."""
    folder = tmp_path / "evil\x1b[2J" / "checkpoint-1"
    folder.mkdir(parents=True)
    (folder / "latest").write_text("evil\x1b]0;title\x07")
    if content is not None:
        (folder / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError) as caught:
        newest_complete(folder.parent)
    (record,) = caplog.records
    for text in (str(caught.value), record.getMessage()):
        assert text.isprintable() and r"evil\x1b" in text


def test_without_its_state_in_the_checkpoint_the_optimizer_starts_only_on_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer(tmp_path, save_only_model=True, max_steps=2)[0].train()
    path = str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-2/shampoo").exists()
    for kind in (ShampooTrainer, Trainer):
        with pytest.raises(CheckpointError, match="from step 2, but its checkpoint has no Shampoo state"):
            trainer(tmp_path, kind, ShampooCallback())[0].train(path)
    with pytest.raises(ValueError, match="is complete .*checkpoint-2: it holds no optimizer state"):
        trainer(tmp_path)[0].train(True)
    willing = ShampooCallback()
    willing.require_state = False
    again, _ = trainer(tmp_path, ShampooTrainer, willing, max_steps=4)
    again.train(path)
    assert "the optimizer starts with new state" in caplog.text
    assert set(state_of(inner_optimizer(again.optimizer))["steps"].values()) == {2}


def test_a_trainer_begins_with_the_state_of_another_run(tmp_path: Path) -> None:
    """Schedule and options are its own. When it resumes from its own checkpoints, the state is its own too."""
    before, _ = trainer(tmp_path / "before", max_steps=2)
    before.train()
    start = ShampooCallback(tmp_path / "before/checkpoint-2/shampoo")
    run, _ = trainer(tmp_path / "run", ShampooTrainer, start, max_steps=2)
    run.model.load_state_dict(before.model.state_dict())
    plain = copy.deepcopy(run.model)
    run.train()
    assert set(state_of(inner_optimizer(run.optimizer))["steps"].values()) == {4}
    again, _ = trainer(tmp_path / "twice", ShampooTrainer, start, max_steps=2)
    again.train()
    again.train()
    assert set(state_of(inner_optimizer(again.optimizer))["steps"].values()) == {6}  # the second continues the first
    new_run, _ = trainer(tmp_path / "new", max_steps=2)
    new_run.model.load_state_dict(plain.state_dict())
    new_run.train()
    assert [g["lr"] for g in run.optimizer.param_groups] == [g["lr"] for g in new_run.optimizer.param_groups]
    assert not same_bits(snapshot(run.model.parameters()), snapshot(new_run.model.parameters()))
    again, _ = trainer(tmp_path / "run", ShampooTrainer, start, max_steps=3)
    again.train(True)
    assert set(state_of(inner_optimizer(again.optimizer))["steps"].values()) == {5}


def test_a_state_to_begin_with_that_is_not_there_stops_the_training_at_its_start(tmp_path: Path) -> None:
    run, seen = trainer(tmp_path, ShampooTrainer, ShampooCallback(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="nothing"):
        run.train()
    assert not seen.losses


def test_another_trainer_cannot_lose_the_state_of_ours_and_reads_its_own(tmp_path: Path) -> None:
    trainer(tmp_path / "ours", max_steps=2)[0].train()
    with pytest.raises(CheckpointError, match="written by ShampooTrainer"):
        trainer(tmp_path, Trainer, ShampooCallback())[0].train(str(tmp_path / "ours/checkpoint-2"))
    whole, uninterrupted = trainer(tmp_path / "stock", Trainer, ShampooCallback())
    whole.train()
    again, resumed = trainer(tmp_path / "again", Trainer, ShampooCallback())
    again.train(str(tmp_path / "stock/checkpoint-6"))
    assert resumed.losses == uninterrupted.losses[STOP:]
    ours, read_by_ours = trainer(tmp_path / "stock")
    ours.train(str(tmp_path / "stock/checkpoint-6"))
    assert read_by_ours.losses == uninterrupted.losses[STOP:]


def test_a_shortened_file_makes_a_checkpoint_incomplete(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer(tmp_path, max_steps=4)[0].train()
    (file,) = (tmp_path / "checkpoint-4/shampoo").glob("data-*/*.safetensors")
    file.write_bytes(file.read_bytes()[:-7])
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    assert f"{file} has" in caplog.text


def test_a_new_save_into_a_folder_makes_it_incomplete_first(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=2)[0].train()
    other, _ = trainer(tmp_path, Dying, max_steps=2)
    other._save_optimizer_and_scheduler = lambda _: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        other.train()
    with pytest.raises(ValueError, match="checkpoint-2: its save was interrupted"):
        newest_complete(tmp_path)


def loop(folder: Path, load: bool, attached: bool = True) -> nn.Module:
    accelerator = Accelerator(cpu=True)
    model = zoo_model("odd")
    optimizer: Any = shampoo(named(model), momentum=0.9)
    model, optimizer = accelerator.prepare(model, optimizer)
    if attached:
        add_to_save_state(accelerator, optimizer)
    if load:
        with torch.no_grad():
            for p in model.parameters():
                p.add_(1.0)
        accelerator.load_state(str(folder))
    else:
        train(model, optimizer, range(SAVED), sometimes=True)
        accelerator.save_state(str(folder))
    train(model, optimizer, range(SAVED, 8), sometimes=True)
    return model


def test_an_accelerate_loop_goes_on_to_the_bit(tmp_path: Path) -> None:
    whole = loop(tmp_path / "a", load=False)
    assert (tmp_path / "a/shampoo/manifest.json").is_file()
    assert same_bits(snapshot(whole.parameters()), snapshot(loop(tmp_path / "a", load=True).parameters()))
    loop(tmp_path / "b", load=False, attached=False)  # without the hook, optimizer.bin has all of the state
    assert same_bits(snapshot(whole.parameters()), snapshot(loop(tmp_path / "b", load=True).parameters()))


def test_accelerate_raises_if_the_state_is_missing(tmp_path: Path) -> None:
    loop(tmp_path, load=False)
    with pytest.raises(RuntimeError, match="says where the optimizer.s state is saved"):
        loop(tmp_path, load=True, attached=False)
    (tmp_path / "shampoo/manifest.json").unlink()
    with pytest.raises(CheckpointError, match="no manifest.json"):
        loop(tmp_path, load=True)


def test_save_state_takes_shampoos_only(tmp_path: Path) -> None:
    accelerator, model = Accelerator(cpu=True), zoo_model("odd")
    with pytest.raises(TypeError, match=r"this is torch\.optim\.adamw\.AdamW"):
        add_to_save_state(accelerator, torch.optim.AdamW(model.parameters()))
    for name in ("first", "second"):
        attached = shampoo([(n, p) for n, p in named(model) if ("bias" in n) == (name == "first")])
        add_to_save_state(accelerator, attached)
        add_to_save_state(accelerator, attached)
        train(model, attached, range(1))
    accelerator.save_state(str(tmp_path))
    assert {path.name for path in tmp_path.glob("shampoo*")} == {"shampoo", "shampoo_1"}


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def pair(weights: nn.Module | None = None, **options: Any) -> tuple[nn.Module, Shampoo]:
    """Return a model and its optimizer; the layer `sometimes` is not always used, so that steps differ."""
    model = zoo_model("odd")
    if weights is not None:
        model.load_state_dict(weights.state_dict())
    return model, shampoo(named(model), momentum=0.9, exclude=(), **options)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(("before", "refresh"), [(SAVED, "sync"), (SAVED, "background"), (0, "sync")])
def test_torchs_helpers_carry_the_state_to_the_bit(flat: bool, before: int, refresh: str, tmp_path: Path) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = pair(refresh=refresh)
    train(model, optimizer, range(before))
    optimizer.rejected_steps = 2 if before else 0
    stacks = optimizer.state_dict()["shampoo"]["stacks"]
    assert any(any(stack["pending"]) for stack in stacks) == (refresh == "background")
    dcp.save({"o": get_optimizer_state_dict(model, optimizer, options=options)}, checkpoint_id=tmp_path)
    again, second = pair(model, refresh=refresh)
    untouched = snapshot(again.parameters())
    template: Any = {"o": get_optimizer_state_dict(again, second, options=options)}
    assert same_bits(snapshot(again.parameters()), untouched) and not second.has_state  # after torch's hidden step
    dcp.load(template, checkpoint_id=tmp_path)
    set_optimizer_state_dict(again, second, template["o"], options=options)
    assert second.has_state == bool(before) and second.rejected_steps == optimizer.rejected_steps
    for trained, its in ((model, optimizer), (again, second)):
        train(trained, its, range(before, 8), sometimes=True)
    assert same_bits(snapshot(model.parameters()), snapshot(again.parameters()))
    assert same_bits(state_of(optimizer), state_of(second))
    assert second.param_groups[0]["exclude"] == ()


def test_what_was_loaded_in_another_way_can_be_asked_for_at_once(tmp_path: Path) -> None:
    model, optimizer = pair()
    train(model, optimizer, range(SAVED))
    asked: Any = get_optimizer_state_dict(model, optimizer)
    again, second = pair(model)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same_bits(get_optimizer_state_dict(again, second)["state"], asked["state"])


def test_options_are_those_from_before_torch_took_them_apart() -> None:
    """Gathering a state dict turns tuples into lists and drops empty ones, even if the default is not empty."""
    _, optimizer = pair(betas=(0.8, 0.9), rules=[{"match": "up.*", "split": []}])
    group = dict(optimizer.param_groups[0])
    robbed = {n: list(v) if isinstance(v, tuple) else v for n, v in robust_group(group).items() if v != ()}
    assert "exclude" not in robbed
    completed = completed_group(robbed)
    options = [ShampooConfig(**{name: found[name] for name in OPTION_NAMES}) for found in (completed, group)]
    assert options[0] == options[1] and options[0].rules[0]["split"] == ()
    assert completed["params"] == group["params"]


def test_torchs_helpers_and_another_optimizer_s_state() -> None:
    model, optimizer = pair()
    adamw = torch.optim.AdamW([p for _, p in named(model)])
    with pytest.raises(ValueError, match="was not saved by Shampoo"):
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, adamw))


def test_torchs_helpers_and_other_blocks() -> None:
    """Options are loaded as from any state dict; if they mean other blocks than the saved bytes, that is an error."""
    model, optimizer = pair()
    train(model, optimizer, range(SAVED))
    state: Any = get_optimizer_state_dict(model, optimizer)
    for group in state["param_groups"]:
        group["max_preconditioner_dim"] = 4
    again, second = pair(model)
    set_optimizer_state_dict(again, second, state)
    with pytest.raises(ValueError, match=r"the saved blocks of 'embed\.weight' have \d+ bytes, but here they have \d+"):
        train(again, second, range(1))


def test_torchs_named_optimizer_is_refused_with_what_to_use_instead() -> None:
    """Its state dicts would hold only steps, and a run that loads one would begin with new state without a word."""
    with pytest.raises(LayoutError, match=r"^_NamedOptimizer\(optimizer_class=Shampoo\) is not .* save_shampoo"):
        _NamedOptimizer(nn.Linear(4, 4).named_parameters(), Shampoo, lr=0.1)  # type: ignore[arg-type]
