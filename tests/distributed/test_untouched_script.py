"""Another project's script needs no line of code: the name in its JSON is enough where the package is installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.launch import free_port

STANDIN = Path(__file__).resolve().parent / "standin"
SCRIPT, CONFIG = STANDIN / "run_clm.py", STANDIN / "ds_config_zero2.json"
STEPS = 12
# DeepSpeed would compile, for a minute, a kernel that only speeds up inference; the script itself stays untouched.
SITE = """
import os
if "RANK" in os.environ:
    import deepspeed.ops
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one run of the script, with torchrun on two ranks."""
    folder = tmp_path_factory.mktemp("untouched")
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(SITE)
    prepare(folder)
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
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_port",
        str(free_port()),
    ]
    given = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    command = [*torchrun, str(SCRIPT), *given, "--do_train", "--use_cpu"]
    environment = os.environ | {
        "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder / "site"),
        "HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),
    }  # fmt: skip
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return folder / "out"


def prepare(folder: Path) -> None:
    """A text, a tokenizer of its words and the configuration of a tiny model."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    line = "shampoo keeps one factor matrix per side of a weight and divides its gradient by their roots"
    (folder / "text.txt").write_text("\n".join([line] * 120))
    vocabulary = {word: i for i, word in enumerate(["?", *dict.fromkeys(line.split())])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(folder / "model")
    LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder / "model")  # fmt: skip


def test_the_script_and_its_json_know_nothing_of_this_package() -> None:
    assert "shampoo" not in SCRIPT.read_text().lower()
    optimizer = json.loads(CONFIG.read_text())["optimizer"]
    assert optimizer == {"type": "Shampoo", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")}
    assert "zero_allow_untested_optimizer" not in CONFIG.read_text()


def test_it_trains_with_shampoo(run: Path) -> None:
    """The state that DeepSpeed saved is Shampoo's: blocks of the model's matrices, by name."""
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == STEPS and losses[-1] < 0.6 * losses[0]
    files = sorted((run / f"checkpoint-{STEPS}" / f"global_step{STEPS}").glob("*_optim_states.pt"))
    assert len(files) == 2
    saved = [torch.load(file, weights_only=False)["optimizer_state_dict"]["base_optimizer_state"] for file in files]
    for matrix in ("0.self_attn.o_proj", "0.mlp.up_proj", "1.self_attn.o_proj", "1.mlp.up_proj"):
        block = f"model.layers.{matrix}.weight/0"
        assert sum(block in texts(state["shampoo"]) for state in saved) == 1, "one rank owns a block"


def texts(value: Any) -> set[str]:
    """All strings in nested lists and dicts, keys too."""
    if isinstance(value, dict):
        return {key for key in value if isinstance(key, str)} | texts(list(value.values()))
    if isinstance(value, (list, tuple, set)):
        return set().union(*map(texts, value))
    return {value} if isinstance(value, str) else set()
