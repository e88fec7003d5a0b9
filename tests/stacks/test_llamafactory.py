"""LLaMA-Factory's own launcher trains with Shampoo by its name in a YAML, and by DeepSpeed's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.commands import python_module, run, torchrun
from tests.support.launch import ROOT
from tests.support.snippets import stack_block
from tests.support.stack_runs import assert_learned
from tests.support.tiny_text import LINE

STEPS = 8
MODULES = f"{ROOT}:{Path(__file__).parent / 'without_audio'}"
ENVIRONMENT = {"DISABLE_VERSION_CHECK": "1", "PYTHONPATH": MODULES}


def write(text: Path, folder: Path, **changes: Any) -> None:
    """Write a data set and the configuration."""
    (folder / "words.json").write_text(json.dumps([{"text": LINE}] * 200))
    info = {"words": {"file_name": "words.json", "columns": {"prompt": "text"}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    rest = {
        "stage": "pt", "do_train": True, "finetuning_type": "full", "dataset": "words",
        "model_name_or_path": str(text / "model"),
        "dataset_dir": ".", "cutoff_len": 16, "output_dir": "out", "max_steps": STEPS, "save_steps": STEPS,
        "logging_steps": 1, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": "none", "template": "empty",
    }  # fmt: skip
    (folder / "train.yaml").write_text(yaml.safe_dump(yaml.safe_load(stack_block("llamafactory")) | rest | changes))


def logged(folder: Path) -> list[float]:
    history = json.loads((folder / "out" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def test_the_launcher_trains_by_the_name(text: Path, tmp_path: Path) -> None:
    write(text, tmp_path)
    command = [*python_module("shampoo_deepspeed.integrations.optim_shampoo"), "-m", "llamafactory.launcher"]
    run([*command, "train.yaml"], tmp_path, **ENVIRONMENT)
    assert_learned(logged(tmp_path))
    state = torch.load(tmp_path / "out" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    blocks = {key.rpartition("/")[0] for stack in state["shampoo"]["stacks"] for key in stack["keys"]}
    assert "model.layers.1.mlp.up_proj.weight" in blocks
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & blocks


@pytest.mark.parametrize("stage", [2, 3])
def test_it_trains_by_the_json_of_deepspeed(stage: int, text: Path, tmp_path: Path) -> None:
    write(text, tmp_path, optim="adamw_torch", optim_args=None, deepspeed="ds.json")
    config = {
        "optimizer": {"type": "Shampoo", "params": {"lr": "auto", "weight_decay": "auto", "precondition_frequency": 5}},
        "zero_optimization": {"stage": stage}, "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }  # fmt: skip
    (tmp_path / "ds.json").write_text(json.dumps(config))
    script = Path(__file__).with_name("llamafactory_script.py")
    run([*torchrun(2), script, "train.yaml"], tmp_path, **ENVIRONMENT)
    assert_learned(logged(tmp_path))
    assert list((tmp_path / "out").glob(f"checkpoint-{STEPS}/global_step{STEPS}/shampoo/manifest.json"))
