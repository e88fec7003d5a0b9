"""`optim="shampoo"` by an import or a command line alone, and an error if another optimizer trains under that name."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import Trainer, TrainingArguments, trainer

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.integrations import optim_shampoo
from shampoo_deepspeed.integrations.optim_shampoo import USAGE, main
from shampoo_deepspeed.integrations.trainer import NamedOptimizerCheck, ShampooTrainer, register_with_transformers
from shampoo_deepspeed.integrations.transformers_names import options_from_text
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.support.snippets import stack_block
from tests.support.trainings import make_data, make_model

SCRIPT = """
import sys
import sibling
from transformers import HfArgumentParser, TrainingArguments

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
assert __name__ == "__main__" and sys.argv[0].endswith("train.py")
print(sibling.NAME, arguments.optim, arguments.optim_args)
"""
LINE = ["--output_dir", "out", "--use_cpu", "--optim", "shampoo", "--optim_args", "precondition_frequency=5"]


@pytest.fixture
def arguments(tmp_path: Path) -> Any:
    def make(**changes: Any) -> TrainingArguments:
        given: dict[str, Any] = {
            "use_cpu": True,
            "max_steps": 2,
            "report_to": "none",
            "save_strategy": "no",
            "optim": "shampoo",
        }
        return TrainingArguments(str(tmp_path), **given | changes)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("form", ["script", "module"])
def test_a_script_that_does_not_know_the_name_is_run_with_it(form: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "train.py").write_text(SCRIPT)
    (tmp_path / "inside" / "sibling.py").write_text("NAME = 'sibling'\n")
    command = ["inside/train.py"] if form == "script" else ["-m", "train"]
    here = tmp_path if form == "script" else tmp_path / "inside"
    launched = [sys.executable, "-m", "shampoo_deepspeed.integrations.optim_shampoo", *command, *LINE]
    done = subprocess.run(launched, cwd=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "sibling OptimizerNames.SHAMPOO precondition_frequency=5"
    if form == "script":
        alone = subprocess.run([sys.executable, *command, *LINE], cwd=here, capture_output=True, text=True)
        assert alone.returncode != 0 and "shampoo" in alone.stderr


def test_the_page_s_command_names_this_module_and_options_that_exist() -> None:
    *_, flag, module, script, name, value, key, options = shlex.split(stack_block("launcher"))
    assert (flag, module, script) == ("-m", optim_shampoo.__name__, "train.py")
    assert (name, value, key) == ("--optim", "shampoo", "--optim_args")
    assert ShampooConfig.from_options(options_from_text(options)).precondition_frequency == 5


@pytest.mark.parametrize("line", [[], ["-m"], ["--optim", "shampoo"]])
def test_a_command_line_that_names_no_script_shows_how(line: list[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(line)
    assert str(error.value) == USAGE


def test_an_import_is_enough(arguments: Any) -> None:
    importlib.reload(optim_shampoo)
    run = Trainer(make_model("llama"), arguments(), train_dataset=make_data(2))
    run.train()
    assert isinstance(inner_optimizer(run.optimizer), Shampoo)
    assert trainer.DEFAULT_CALLBACKS.count(NamedOptimizerCheck) == 1


@pytest.mark.parametrize("kind", [Trainer, ShampooTrainer])
def test_a_second_optimizer_is_an_error(kind: type[Trainer], arguments: Any) -> None:
    register_with_transformers()
    model = make_model("llama")
    before = [p.detach().clone() for p in model.parameters()]
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = kind(model, arguments(), train_dataset=make_data(2), optimizers=(adam, None))
    with pytest.raises(RuntimeError, match=r'AdamW, not Shampoo; optim="shampoo" asks for Shampoo too; leave out one'):
        run.train()
    assert all(map(torch.equal, before, model.parameters()))
    Trainer(model, arguments(optim="adamw_torch"), train_dataset=make_data(2)).train()  # which asks for nothing else


def test_an_optimizer_in_deepspeed_s_json_is_an_error(arguments: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also another Shampoo, since the options in optim_args would be dropped."""
    register_with_transformers()
    config = {"optimizer": {"type": "Shampoo"}}
    run = Trainer(make_model("llama"), arguments(), train_dataset=make_data(2))
    plugin = SimpleNamespace(hf_ds_config=SimpleNamespace(config=config))
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.DEEPSPEED)
    monkeypatch.setitem(AcceleratorState._shared_state, "deepspeed_plugins", plugin)
    assert run.model is not None
    optimizer = Shampoo(run.model.parameters())
    with pytest.raises(ValueError, match='the DeepSpeed JSON has an "optimizer" section'):
        NamedOptimizerCheck().on_train_begin(run.args, run.state, run.control, optimizer=optimizer)


def test_versions_without_callbacks_of_all_trainers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trainer, "DEFAULT_CALLBACKS")
    with pytest.raises(RuntimeError, match=r'optim="shampoo" does not work with transformers 5\.'):
        register_with_transformers()
