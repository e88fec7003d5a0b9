"""LLaMA-Factory's own launcher trains with Shampoo by its name in a YAML, and by DeepSpeed's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from tests.support.commands import python_module, run
from tests.support.snippets import stack_block
from tests.support.stack_runs import assert_learned
from tests.support.tiny_text import LINE

STEPS = 8


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


def test_the_launcher_trains_by_the_name(text: Path, tmp_path: Path) -> None:
    write(text, tmp_path)
    command = [*python_module("shampoo_deepspeed.integrations.optim_shampoo"), "-m", "llamafactory.launcher"]
    run([*command, "train.yaml"], tmp_path, DISABLE_VERSION_CHECK="1")
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert_learned([entry["loss"] for entry in history if "loss" in entry])
    state = torch.load(tmp_path / "out" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert any("model.layers.1.mlp.up_proj.weight" in key for key in map(str, state["shampoo"]))
