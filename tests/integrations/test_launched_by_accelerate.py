"""DeepSpeed by accelerate's launcher instead of by TrainingArguments: the Trainer's arguments do not mention it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.launch import free_port

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from transformers import Trainer, TrainingArguments
from shampoo_deepspeed.integrations.trainer import ShampooCallback, ShampooFactory, ShampooTrainer, deferred
from shampoo_deepspeed.state.unwrap import unwrap
from tests.support.trainings import Training, make_data, make_model

way, folder, steps, resume = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "resume"
arguments = TrainingArguments(
    folder, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, lr_scheduler_type="constant",
    use_cpu=True, report_to=[], save_steps=3, logging_steps=1, disable_tqdm=True,
)
assert arguments.deepspeed is None and arguments.deepspeed_plugin is not None
given = {"model": make_model("llama"), "args": arguments, "train_dataset": make_data(16)}
if way == "factory":
    more = {"optimizer_cls_and_kwargs": (ShampooFactory, {"lr": 1e-2}), "callbacks": [ShampooCallback]}
    trainer = Trainer(**given, **more)
else:
    trainer = ShampooTrainer(**given, optimizers=(deferred(), None) if way == "deferred" else (None, None))
assert any(isinstance(callback, ShampooCallback) for callback in trainer.callback_handler.callbacks)
trainer.train(resume_from_checkpoint=resume or None)
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print(json.dumps({"losses": losses, "steps": unwrap(trainer.optimizer).units[0].steps[0]}))
"""


def trained(way: str, folder: Path, steps: int, resume: bool = False) -> Any:
    """What a process prints that trains for so many steps in all."""
    environment = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(folder / "ds.json"),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    command = [sys.executable, "-c", SCRIPT, way, str(folder / "out"), str(steps), "resume" if resume else "begin"]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["deferred", "factory", "json"])
def test_a_run_resumes_and_is_watched(way: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
    }
    if way == "json":
        config["optimizer"] = {"type": "Shampoo", "params": {"lr": 1e-2}}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    assert trained(way, tmp_path, 3)["steps"] == 3
    resumed = trained(way, tmp_path, 5, resume=True)
    assert resumed["steps"] == 5 and len(resumed["losses"]) == 5
