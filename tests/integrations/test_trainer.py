"""The Trainer in one process: factory, `optimizers=` in both forms, `optim="shampoo"`, metrics in logs, and errors."""

from __future__ import annotations

import copy
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    HfArgumentParser,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    trainer_optimizer,
    training_args,
)
from transformers.training_args import OptimizerNames

from shampoo_deepspeed import LayoutError, OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.integrations.trainer import (
    ShampooCallback,
    ShampooFactory,
    ShampooTrainer,
    ShampooTrainerMixin,
    deferred,
    register_with_transformers,
)
from shampoo_deepspeed.integrations.transformers_names import options_from_text
from shampoo_deepspeed.options.presets import PRESETS
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.support.trainings import DECAY, RATE, Training, make_data, make_model, trainer_groups

pytestmark = pytest.mark.slow

TRAINING = Training(steps=4)
OPTIONS = TRAINING.trainer_options() | TRAINING.own_options()
NAMED = {"optim": "shampoo", "optim_args": TRAINING.optim_args()}


class Losses(TrainerCallback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rates: list[float] = []

    def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **__: Any) -> None:
        self.rates.append(inner_optimizer(optimizer).param_groups[0]["lr"])

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])


@pytest.fixture
def arguments(tmp_path: Path) -> Iterator[Any]:
    """Return a function that makes TrainingArguments; afterwards, accelerate's global state is reset."""
    environment = dict(os.environ)

    def make(**changes: Any) -> TrainingArguments:
        return TrainingArguments(str(tmp_path), **(TRAINING.arguments(1) | changes))

    yield make
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ.clear()
    os.environ.update(environment)


def trained(
    kind: type[Trainer], model: nn.Module, arguments: TrainingArguments, **given: Any
) -> tuple[Trainer, Losses]:
    seen = Losses()
    trainer = kind(model, arguments, train_dataset=make_data(TRAINING.steps), callbacks=[seen], **given)
    trainer.train()
    return trainer, seen


def test_the_trainer_evaluates_and_saves_averages_and_checkpoints_hold_weights(
    arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    data = make_data(TRAINING.steps)
    trainer = ShampooTrainer(
        model,
        arguments(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2),
        train_dataset=data,
        eval_dataset=data,
        optimizers=(deferred(ema_decay=0.8, **OPTIONS), None),
    )
    trainer.train()
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = trainer.evaluate()["eval_loss"]
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters())
    trainer.save_model(str(tmp_path / "averaged"))
    saved = load_file(tmp_path / "averaged" / "model.safetensors")
    assert not torch.equal(saved["model.norm.weight"], weights["model.norm.weight"])
    pushed: list[str] = []
    hub = SimpleNamespace(upload_folder=lambda **given: pushed.append(given["folder_path"]))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(trainer, "init_hf_repo", lambda **_: setattr(trainer, "hub_model_id", "somebody/model"))
    monkeypatch.setattr(trainer, "create_model_card", lambda **_: None)
    trainer.push_to_hub()
    assert pushed == [trainer.args.output_dir]
    again = load_file(Path(pushed[0]) / "model.safetensors")
    assert all(torch.equal(again[n], saved[n]) for n in saved)
    newest = max(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    assert int(newest.name.rpartition("-")[2]) == TRAINING.steps
    kept = load_file(newest / "model.safetensors")
    assert all(torch.equal(kept[n], weights[n]) for n in kept)
    model.load_state_dict(saved, strict=False)
    plain = Trainer(model, arguments(), eval_dataset=data)
    assert plain.evaluate()["eval_loss"] == pytest.approx(found, abs=1e-6)


def test_the_best_checkpoint_cannot_be_one_of_averages(arguments: Any) -> None:
    best = arguments(
        load_best_model_at_end=True, save_strategy="steps", eval_strategy="steps", save_steps=2, eval_steps=2
    )
    data = make_data(TRAINING.steps)
    trainer = ShampooTrainer(
        make_model("llama"),
        best,
        train_dataset=data,
        eval_dataset=data,
        optimizers=(deferred(ema_decay=0.8, **OPTIONS), None),
    )
    with pytest.raises(ValueError, match="load_best_model_at_end = True is not allowed with Shampoo's ema_decay"):
        trainer.train()


def built(model: nn.Module) -> Shampoo:
    return Shampoo(trainer_groups(model), model=model, **OPTIONS)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "tied_llama"])
def test_the_factory_s_groups_are_the_trainer_s(kind: str, arguments: Any) -> None:
    model = make_model(kind)
    stock = Trainer(model, arguments(optim="adamw_torch")).create_optimizer()
    ours = ShampooFactory()(model, **OPTIONS)
    assert [g["weight_decay"] for g in ours.param_groups] == [g["weight_decay"] for g in stock.param_groups]
    assert [g["weight_decay"] for g in ours.param_groups] == [DECAY, 0.0]
    for group, wanted in zip(ours.param_groups, stock.param_groups, strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in wanted["params"]]
    names = {id(p): n for n, p in model.named_parameters()}
    assert all(g["param_names"] == [names[id(p)] for p in g["params"]] for g in ours.param_groups)


def test_the_factory_leaves_frozen_parameters_and_empty_groups_out() -> None:
    model = make_model("llama")
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith("up_proj.weight")
    (group,) = ShampooFactory()(model, lr=0.1, weight_decay=0.2).param_groups
    assert group["param_names"] == [f"model.layers.{n}.mlp.up_proj.weight" for n in (0, 1)]
    assert group["weight_decay"] == 0.2


def test_no_decay_patterns_hold_instead_of_the_trainer_s_rule() -> None:
    (group,) = ShampooFactory()(make_model("gpt2"), lr=0.1, weight_decay=0.2, no_decay=[]).param_groups
    assert "transformer.ln_f.bias" in group["param_names"] and group["weight_decay"] == 0.2


def test_the_factory_knows_module_types() -> None:
    """It gets the model, so kinds in patterns work."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3))
    optimizer = ShampooFactory()(model, lr=0.1)
    kinds = {entry.parameter.key: entry.parameter.kinds for entry in optimizer.entries}
    assert kinds["0.weight"] == {"embedding", "tokens"} and not kinds["1.weight"]


def test_an_unknown_option_is_an_error(arguments: Any) -> None:
    with pytest.raises(OptionError, match="did you mean 'precondition_frequency'"):
        trained(
            Trainer,
            make_model("llama"),
            arguments(),
            optimizer_cls_and_kwargs=(ShampooFactory, {"precondition_frequncy": 3}),
        )


def test_all_forms_are_one_training(arguments: Any) -> None:
    runs = []
    register_with_transformers()
    for form in ("stock", "prebuilt", "deferred", "factory", "name", "mixed_name"):
        model = make_model("llama")
        asked = arguments(**NAMED) if form.endswith("name") else arguments()
        given: dict[str, Any] = {} if form.endswith("name") else {"optimizers": (deferred(**OPTIONS), None)}
        if form in ("stock", "prebuilt"):
            given = {"optimizers": (built(model), None)}
        if form == "factory":
            given = {"optimizer_cls_and_kwargs": (ShampooFactory, OPTIONS)}
        kind = Trainer if form in ("stock", "factory", "name") else ShampooTrainer
        runs.append(trained(kind, model, asked, **given)[1].losses)
    assert len(runs[0]) == TRAINING.steps and runs[0][-1] != runs[0][0]
    assert all(run == runs[0] for run in runs)


def test_a_finished_optimizer_is_the_one_that_trains(arguments: Any) -> None:
    model = make_model("llama")
    optimizer = built(model)
    trainer, _ = trained(ShampooTrainer, model, arguments(), optimizers=(optimizer, None))
    assert inner_optimizer(trainer.optimizer) is optimizer


@pytest.mark.parametrize("kind", [Trainer, ShampooTrainer])
def test_a_layer_that_is_new_since_the_optimizer_was_built_is_an_error(kind: type[Trainer], arguments: Any) -> None:
    model: Any = make_model("llama")
    optimizer = built(model)
    model.lm_head = nn.Linear(32, model.config.vocab_size, bias=False)
    message = r"(are no longer the model's and would never be trained \(lm_head.weight\)|1 of .* are not the model's)"
    with pytest.raises((LayoutError, ValueError), match=message):
        trained(kind, model, arguments(), optimizers=(optimizer, None))


def test_auto_takes_the_values_of_the_arguments(arguments: Any) -> None:
    asked = deferred(lr="auto", betas="auto", eps="auto", weight_decay="auto", precondition_frequency=3)
    trainer = ShampooTrainer(make_model("llama"), arguments(), optimizers=(asked, None))
    group = trainer.create_optimizer().param_groups[0]
    wanted = TRAINING.trainer_options() | {"betas": tuple(OPTIONS["betas"]), "precondition_frequency": 3}
    assert {key: group[key] for key in wanted} == wanted


def test_a_given_scheduler_sets_the_rate(arguments: Any) -> None:
    model = make_model("llama")
    optimizer = built(model)
    scheduler = LambdaLR(optimizer, lambda step: 0.5**step)
    trainer, seen = trained(ShampooTrainer, model, arguments(), optimizers=(optimizer, scheduler))
    assert trainer.lr_scheduler is scheduler
    assert seen.rates == [RATE * 0.5**step for step in range(TRAINING.steps)]


def test_the_mixin_takes_the_decay_rule_of_its_trainer(arguments: Any) -> None:
    class Decaying(Trainer):
        def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
            return [name for name, _ in model.named_parameters() if "up_proj" in name]

    class Mixed(ShampooTrainerMixin, Decaying):
        pass

    trainer = Mixed(make_model("llama"), arguments(), optimizers=(deferred(lr=0.1, weight_decay=0.2), None))
    first, second = trainer.create_optimizer().param_groups
    assert all("up_proj" in name for name in first["param_names"]) and len(first["params"]) == 4
    assert (first["weight_decay"], second["weight_decay"]) == (0.2, 0.0)


def test_other_optimizers_pass_through(arguments: Any) -> None:
    model = make_model("llama")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    trainer = ShampooTrainer(model, arguments(), optimizers=(optimizer, None))
    assert trainer.optimizer is optimizer
    assert not any(isinstance(c, ShampooCallback) for c in trainer.callback_handler.callbacks)
    assert ShampooTrainer(model, arguments()).optimizer is None


def test_deferred_works_with_model_init(arguments: Any) -> None:
    given = {"model_init": lambda: make_model("llama"), "optimizers": (deferred(**OPTIONS), None)}
    trainer = ShampooTrainer(args=arguments(), train_dataset=make_data(TRAINING.steps), **given)
    trainer.train()
    assert isinstance(inner_optimizer(trainer.optimizer), Shampoo)


def test_the_name_is_registered_once_and_travels() -> None:
    for _ in range(2):
        register_with_transformers()
    member = OptimizerNames("shampoo")
    assert [m.value for m in OptimizerNames].count("shampoo") == 1 and OptimizerNames["SHAMPOO"] is member
    assert member == "shampoo" and pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is member
    assert OptimizerNames("adamw_torch").value == "adamw_torch"


def test_the_name_works_on_the_command_line(tmp_path: Path, arguments: Any) -> None:
    register_with_transformers()
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--optim", "shampoo", "--optim_args", "betas=0.8;0.9"]
    parser: Any = HfArgumentParser  # whose annotations allow no class
    (asked,) = parser(TrainingArguments).parse_args_into_dataclasses(line)
    group = Trainer(make_model("llama"), asked).create_optimizer().param_groups[0]
    assert group["betas"] == (0.8, 0.9) and group["lr"] == asked.learning_rate


@pytest.mark.parametrize("way", ["deferred", "name"])
def test_a_search_for_hyperparameters_gets_the_rates_that_it_tries(way: str, arguments: Any) -> None:
    """The Trainer changes its arguments and trains again, from `model_init`."""
    given = {"optimizers": (deferred(weight_decay="auto"), None)} if way == "deferred" else {}
    asked = arguments(**(NAMED if way == "name" else {}), max_steps=1, lr_scheduler_type="constant")
    seen = Losses()
    trainer = ShampooTrainer(
        model_init=lambda: make_model("llama"), args=asked, train_dataset=make_data(2), callbacks=[seen], **given
    )
    decays = []
    for rate, decay in ((0.1, 0.3), (0.2, 0.0)):
        trainer.args.learning_rate, trainer.args.weight_decay = rate, decay
        trainer.train()
        decays.append(inner_optimizer(trainer.optimizer).param_groups[0]["weight_decay"])
    assert seen.rates == [0.1, 0.2] and decays == [0.3, 0.0]


def test_a_json_that_accelerate_ignores_trains_no_other_optimizer(arguments: Any) -> None:
    """accelerate ignores it if ACCELERATE_USE_CPU is set; a Trainer for Shampoo then raises an error."""
    asked = arguments()
    asked.hf_deepspeed_config = SimpleNamespace(config={"optimizer": {"type": "Shampoo"}})
    trainer = ShampooTrainer(make_model("llama"), asked, train_dataset=make_data(2))
    with pytest.raises(RuntimeError, match="the optimizer that trains is torch.optim.adamw.AdamW, not Shampoo"):
        trainer.train()


def test_options_as_text_become_what_they_are() -> None:
    text = (
        "lr=2e-3, betas=0.9;0.95, max_preconditioner_dim=64, no_decay=*bias*;kind:layernorm, exclude=, "
        "use_nesterov=true, momentum=.5, grafting=sgd, elementwise=none, grafting_beta2=null, "
        "communication_dtype=bfloat16"
    )
    assert options_from_text(text) == {
        "lr": 2e-3, "betas": [0.9, 0.95], "max_preconditioner_dim": 64, "no_decay": ["*bias*", "kind:layernorm"],
        "exclude": [], "nesterov": True, "momentum": 0.5, "grafting": "sgd", "elementwise": "none",
        "grafting_beta2": None, "communication_dtype": "bfloat16",
    }  # fmt: skip
    assert options_from_text("") == {}


@pytest.mark.parametrize("option", ShampooConfig().to_json().items(), ids=lambda option: option[0])
def test_every_option_can_be_written_as_text(option: tuple[str, Any]) -> None:
    key, value = option
    if key == "rules":  # rules cannot be written as text, but can be switched off
        assert options_from_text("rules=") == {"rules": []}
        assert options_from_text("split=4;2, exponent_override=null;3") == {
            "split": [4, 2],
            "exponent_override": [None, 3],
        }
        with pytest.raises(OptionError, match="'rules' in optim_args can only be empty"):
            options_from_text("rules=*q_proj*")
        return
    as_text = ";".join(map(str, value)) if isinstance(value, list) else json.dumps(value).strip('"')
    assert ShampooConfig.from_options(options_from_text(f"{key}={as_text}")) == ShampooConfig()


def test_a_preset_can_be_written_as_text() -> None:
    """It stands for its options; those that the text gives as well win, and "auto" stays with TrainingArguments."""
    expected = {**PRESETS["paper"], "relative_epsilon": 1e-3}
    assert options_from_text("preset=paper, relative_epsilon=1e-3") == expected
    assert options_from_text("relative_epsilon=1e-3, preset=paper") == expected
    assert options_from_text("preset=null") == {}
    assert not {"lr", "betas", "eps", "weight_decay"} & expected.keys()
    with pytest.raises(OptionError, match="'preset' = 'pape' is not allowed: null or one of paper"):
        options_from_text("preset=pape")


def test_a_trainer_takes_a_preset_by_name_and_deferred(arguments: Any) -> None:
    register_with_transformers()
    named = arguments(optim="shampoo", optim_args="preset=paper,relative_epsilon=1e-3")
    by_hand = deferred(lr="auto", betas="auto", preset="paper", relative_epsilon=1e-3)
    for trainer in (
        ShampooTrainer(make_model("llama"), args=named),
        ShampooTrainer(make_model("llama"), args=arguments(), optimizers=(by_hand, None)),
    ):
        group = trainer.create_optimizer().param_groups[0]
        expected = {**PRESETS["paper"], "relative_epsilon": 1e-3, "betas": (named.adam_beta1, named.adam_beta2)}
        assert {name: group[name] for name in expected} == expected and "preset" not in group


@pytest.mark.parametrize(
    "text, message",
    [
        ("precondition_frequncy=3", "did you mean 'precondition_frequency'"),
        ("precondition_frequency=often", "'precondition_frequency' = 'often' is not allowed: an integer"),
        ("betas=0.9", "'betas' = .0.9. is not allowed: two numbers"),
        ("nesterov", "'nesterov' in optim_args has no value"),
        ("lr=1e-3,lr=2e-3", "'lr' is given twice in optim_args"),
    ],
)
def test_wrong_text_is_an_error_before_training(text: str, message: str, arguments: Any) -> None:
    register_with_transformers()
    for kind in (Trainer, ShampooTrainer) if "=" in text else (ShampooTrainer,):
        with pytest.raises(OptionError, match=message):
            trained(kind, make_model("llama"), arguments(optim="shampoo", optim_args=text))


@pytest.mark.parametrize("missing", ["OptimizerNames", "_OPTIMIZER_HANDLERS"])
def test_other_versions_of_transformers_are_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    home = training_args if missing == "OptimizerNames" else trainer_optimizer
    monkeypatch.delattr(home, missing)
    with pytest.raises(RuntimeError, match=r'optim="shampoo" does not work with transformers 5\.'):
        register_with_transformers()


def test_the_mixin_treats_the_name_like_a_deferred_optimizer(arguments: Any) -> None:
    register_with_transformers()
    model = make_model("llama")
    trainer = ShampooTrainer(model, arguments(**NAMED))
    assert any(isinstance(c, ShampooCallback) for c in trainer.callback_handler.callbacks)
    assert isinstance(trainer.create_optimizer(), Shampoo)
    with pytest.raises(ValueError, match="the scheduler in optimizers= was built for another optimizer"):
        ShampooTrainer(model, arguments(**NAMED), optimizers=(None, LambdaLR(built(model), float)))


def test_training_logs_have_the_metrics(arguments: Any) -> None:
    """Only training logs have them; the callback keeps the same metrics."""
    callback = ShampooCallback()
    together = deferred(**OPTIONS, refresh="sync", refresh_growth=0.0)
    given = {"optimizers": (together, None), "callbacks": [callback]}
    trainer = ShampooTrainer(make_model("llama"), arguments(logging_steps=2), train_dataset=make_data(4), **given)
    trainer.train()
    first, second, last = trainer.state.log_history
    assert first["shampoo/refresh_ms"] == 0.0 == first["shampoo/refreshed_share"]
    assert second["shampoo/refresh_ms"] > 0.0 and second["shampoo/refreshed_share"] == 1.0
    assert 1.0 < second["shampoo/largest_condition_number"] <= 1001.1  # 1 / relative_epsilon
    assert not any(key.startswith("shampoo/") for key in last) and "train_loss" in last
    own = [{k: v for k, v in log.items() if k == "step" or k.startswith("shampoo/")} for log in (first, second)]
    assert callback.history == own


def test_the_stock_trainer_s_callback_keeps_the_metrics(arguments: Any) -> None:
    callback = ShampooCallback()
    together = OPTIONS | {"refresh": "sync", "refresh_growth": 0.0}
    asked: dict[str, Any] = {"optimizer_cls_and_kwargs": (ShampooFactory, together), "callbacks": [callback]}
    trainer = Trainer(make_model("llama"), arguments(), train_dataset=make_data(4), **asked)
    trainer.train()
    assert [entry["step"] for entry in callback.history] == [1, 2, 3, 4]
    assert [entry["shampoo/refreshed_share"] for entry in callback.history] == [0.0, 0.0, 1.0, 0.0]
    assert not any(key.startswith("shampoo/") for log in trainer.state.log_history for key in log)


def test_the_callback_names_the_optimizer_that_trains_instead(arguments: Any) -> None:
    trainer = Trainer(make_model("llama"), arguments(), train_dataset=make_data(1), callbacks=[ShampooCallback])
    with pytest.raises(RuntimeError, match=r"the optimizer that trains is torch\.optim\.adamw\.AdamW, not Shampoo"):
        trainer.train()


@pytest.fixture
def job_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, value in {"LOCAL_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("job_of_one_rank")
def test_fsdp_that_accelerate_ignores_is_warned_of(arguments: Any, caplog: pytest.LogCaptureFixture) -> None:
    trainer = ShampooTrainer(
        make_model("llama"), arguments(fsdp=True), train_dataset=make_data(1), optimizers=(deferred(lr=0.1), None)
    )
    trainer.train()
    assert "FSDP was requested, but accelerate does not use it on cpu: this run is MULTI_CPU" in caplog.text


def test_the_trainer_has_one_callback_of_this_kind(arguments: Any) -> None:
    given = {"optimizers": (deferred(lr=0.1), None), "callbacks": [ShampooCallback()]}
    trainer = ShampooTrainer(make_model("llama"), arguments(), **given)
    assert sum(isinstance(c, ShampooCallback) for c in trainer.callback_handler.callbacks) == 1


def test_an_optimizer_of_another_model_is_refused(arguments: Any) -> None:
    optimizers = (built(make_model("llama")), None)
    trainer = ShampooTrainer(make_model("llama"), arguments(), train_dataset=make_data(1), optimizers=optimizers)
    with pytest.raises(ValueError, match=r"35 of the optimizer's 35 parameters are not the model's"):
        trainer.train()


def test_a_scheduler_of_another_optimizer_is_refused(arguments: Any) -> None:
    model = make_model("llama")
    other = LambdaLR(built(model), float)
    for optimizer in (built(model), deferred(lr=0.1)):
        with pytest.raises(ValueError, match="the scheduler in optimizers= was built for another optimizer"):
            ShampooTrainer(model, arguments(), optimizers=(optimizer, other))


def test_two_ways_at_once_are_refused(arguments: Any) -> None:
    both = {"optimizers": (deferred(lr=0.1), None), "optimizer_cls_and_kwargs": (ShampooFactory, {"lr": 0.1})}
    with pytest.raises(ValueError, match="both optimizers= and optimizer_cls_and_kwargs= are given"):
        ShampooTrainer(make_model("llama"), arguments(), **both)


def test_optimizers_must_be_given_by_keyword(arguments: Any) -> None:
    rest = (None,) * 7
    with pytest.raises(TypeError, match="by keyword"):
        ShampooTrainer(make_model("llama"), arguments(), *rest, (deferred(lr=0.1), None))


@pytest.mark.parametrize("kept", [True, False])
def test_flat_fsdp1_is_refused_for_a_finished_optimizer(kept: bool, arguments: Any) -> None:
    """It would silently train nothing there."""
    asked = arguments(fsdp=True, fsdp_config={"version": 1, "use_orig_params": kept, "sync_module_states": False})
    assert asked.device.type == "cpu"
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU  # accelerate has no FSDP on CPUs
    model = make_model("llama")
    for optimizer in (built(model), deferred(lr=0.1)):
        if kept or not isinstance(optimizer, Shampoo):
            assert ShampooTrainer(model, asked, optimizers=(optimizer, None)).is_fsdp_enabled
        else:
            with pytest.raises(ValueError, match="FSDP1 with use_orig_params = false .*deferred"):
                ShampooTrainer(model, asked, optimizers=(optimizer, None))
