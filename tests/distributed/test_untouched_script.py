"""Another project's script needs no change under DeepSpeed, where the name in its JSON is enough, and else one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shampoo_deepspeed.checkpoint.manifest import Manifest
from tests.support.commands import run, torchrun
from tests.support.tiny_text import prepare

STANDIN = Path(__file__).resolve().parent / "standin"
SCRIPT, CONFIG = STANDIN / "run_clm.py", STANDIN / "ds_config_zero2.json"
ONE_LINE_SCRIPT = STANDIN / "finetune_lm.py"
STEPS = 12
# Otherwise DeepSpeed would spend a minute compiling a kernel that only speeds up inference. The script stays untouched.
SITE = """
import os
if "RANK" in os.environ:
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untouched")
    prepare(folder)
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> Path:
    """Run the script with torchrun on two ranks, and return its output folder."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    arguments = {
        "config_name": "model",
        "tokenizer_name": "model",
        "train_file": "text.txt",
        "output_dir": "out",
        "deepspeed": str(CONFIG),
        "max_steps": STEPS,
        "save_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "warmup_steps": 2,
        "per_device_train_batch_size": 4,
        "report_to": "none",
    }
    given = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    command: list[str | Path] = [*torchrun(2), SCRIPT, *given, "--do_train", "--use_cpu"]
    run(command, folder, LOCAL_SIZE="2", PYTHONPATH=str(folder / "site"))
    return folder / "out"


def test_the_script_and_its_json_know_nothing_of_this_package() -> None:
    assert "shampoo" not in SCRIPT.read_text().lower()
    optimizer = json.loads(CONFIG.read_text())["optimizer"]
    assert optimizer == {"type": "Shampoo", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    assert "zero_allow_untested_optimizer" not in CONFIG.read_text()


def test_it_trains_with_shampoo(trained: Path) -> None:
    """The saved state is Shampoo's: it has blocks of the model's matrices, by name."""
    history = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert_learned([entry["loss"] for entry in history if "loss" in entry])
    manifest = Manifest.read(trained / f"checkpoint-{STEPS}" / f"global_step{STEPS}" / "shampoo")
    assert manifest.world_size == 2
    for matrix in ("0.self_attn.o_proj", "0.mlp.up_proj", "1.self_attn.o_proj", "1.mlp.up_proj"):
        record = manifest.parameters[f"model.layers.{matrix}.weight"]
        assert record["steps"] == STEPS and record["merged"] is not None


def test_one_line_makes_a_stock_trainer_use_shampoo(folder: Path) -> None:
    """The second stand-in names the factory in `optimizer_cls_and_kwargs=` and knows nothing else of this package."""
    lines = [line for line in ONE_LINE_SCRIPT.read_text().splitlines() if "shampoo" in line.lower()]
    assert len(lines) == 2 and lines[0].startswith("from shampoo_deepspeed.integrations.trainer import")
    given = ["--model_dir", "model", "--train_file", "text.txt", "--output_dir", "out2", "--max_steps", str(STEPS)]
    run([*torchrun(2), ONE_LINE_SCRIPT, *given], folder)
    state = torch.load(folder / "out2" / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
    assert "model.layers.1.mlp.up_proj.weight/0" in texts(state["shampoo"])
    history = json.loads((folder / "out2" / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert_learned([entry["loss"] for entry in history if "loss" in entry])


def assert_learned(losses: list[float]) -> None:
    assert len(losses) == STEPS and losses[-1] < 0.6 * losses[0]


def texts(value: Any) -> set[str]:
    """Return all strings in nested lists and dicts, including keys."""
    if isinstance(value, dict):
        return {key for key in value if isinstance(key, str)} | texts(list(value.values()))
    if isinstance(value, (list, tuple, set)):
        return set().union(*map(texts, value))
    return {value} if isinstance(value, str) else set()
