"""Every example, started as its docstring says, trains a tiny model on CPU ranks; results agree, no files are left."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.runtime.run_log import read_log
from tests.support.commands import accelerate_launch, losses, run, torchrun
from tests.support.launch import ROOT, free_port
from tests.support.zoo import relative_error

EXAMPLES = ROOT / "examples"
STEPS, GLOBAL_BATCH = 4, 8
LINE = "shampoo keeps one factor matrix per side of a weight and divides its gradient by their roots"
NEW_MODEL = ["--hidden_size", "32", "--num_layers", "1", "--vocab_size", "300"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    (folder / "text").mkdir()
    (folder / "text" / "lines.txt").write_text("\n".join([LINE] * 200))
    (folder / "work").mkdir()
    return folder


def arguments(folder: Path, ranks: int) -> list[str]:
    return [
        "--text_dir", str(folder / "text"), "--sequence_length", "16", "--max_steps", str(STEPS), "--use_cpu",
        "--per_device_train_batch_size", str(GLOBAL_BATCH // ranks),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ddp(folder: Path) -> tuple[list[float], Path]:
    """Train two replicas, and return the losses and the folder of the trained model."""
    saved = folder / "ddp"
    given = [*arguments(folder, 2), *NEW_MODEL, "--precondition_frequency", "2", "--output_dir", str(saved)]
    return losses(start([*torchrun(2), EXAMPLES / "ddp_loop.py", *given], folder)), saved


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[float]:
    """Run the same loop on one rank, without a launcher, and return its losses."""
    given = [*arguments(folder, 1), *NEW_MODEL, "--precondition_frequency", "2"]
    group = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    command: list[str | Path] = [sys.executable, EXAMPLES / "ddp_loop.py", *given]
    return losses(start(command, folder, MASTER_PORT=str(free_port()), **group))


def start(command: Sequence[str | Path], folder: Path, **environment: str) -> str:
    """Run an example and return what it prints; check that it leaves no files in the folder where it was started."""
    printed = run(command, folder / "work", **environment)
    assert not any((folder / "work").iterdir())
    return printed


def assert_falling(found: list[float], steps: int = STEPS) -> None:
    assert len(found) == steps and all(0.0 < loss < 10.0 for loss in found)
    assert found[-1] < found[0]


def test_ddp_is_the_training_of_one_process(ddp: tuple[list[float], Path], alone: list[float]) -> None:
    assert_falling(alone)
    assert ddp[0] == pytest.approx(alone, rel=1e-4)


def test_fully_shard_is_the_training_of_ddp(ddp: tuple[list[float], Path], folder: Path) -> None:
    """The saved models are equal too."""
    from safetensors.torch import load_file

    saved = folder / "fsdp2"
    given = [*arguments(folder, 2), *NEW_MODEL, "--precondition_frequency", "2", "--output_dir", str(saved)]
    found = losses(start([*torchrun(2), EXAMPLES / "fully_shard_loop.py", *given], folder))
    assert found == pytest.approx(ddp[0], rel=1e-4)
    ours, theirs = (load_file(place / "model.safetensors") for place in (saved, ddp[1]))
    assert ours.keys() == theirs.keys()
    assert max(relative_error(ours[n], theirs[n]) for n in theirs) <= 2e-3


def test_fsdp2_trainer_under_accelerate_launch(folder: Path) -> None:
    script = [ROOT / "tests" / "support" / "fsdp_on_cpu.py", EXAMPLES / "fsdp2_trainer.py"]
    given = [*arguments(folder, 2), *NEW_MODEL, "--precondition_frequency", "2"]
    printed = start([*accelerate_launch(EXAMPLES / "fsdp2.yaml"), *script, *given], folder)
    assert printed.count("sharded: LlamaDecoderLayer") == 2  # once per rank; the whole model comes after its layers
    assert_falling(losses(printed))


def test_lora_is_the_same_plain_and_under_zero2(ddp: tuple[list[float], Path], folder: Path) -> None:
    """Train adapters of a model that another example has saved, for four steps with a refresh in every second one."""
    own = ["--model", str(ddp[1]), "--lora_rank", "4", "--learning_rate", "1e-2", "--precondition_frequency", "2"]
    script = EXAMPLES / "lora_trainer.py"
    plain = start([sys.executable, script, *arguments(folder, 1), *own], folder)
    assert "2428 trained parameters, 10187 numbers in factor matrices" in plain
    zero = ["--deepspeed", str(EXAMPLES / "ds_zero2.json")]
    sharded = start([*torchrun(2), script, *arguments(folder, 2), *own, *zero], folder)
    assert_falling(losses(plain))
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-4)


def test_fine_tuning_is_the_same_plain_and_under_zero2(
    ddp: tuple[list[float], Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log has all figures before, during and after, from which the demo draws its picture."""
    script = EXAMPLES / "finetune.py"
    size = ["--sequence_length", "128", "--held_out_rows", "8", "--general_rows", "4", "--eval_steps", "2"]
    own = ["--model", str(ddp[1]), *size, "--max_steps", str(STEPS), "--learning_rate", "1e-2", "--use_cpu"]
    own += ["--warmup_steps", "0", "--precondition_frequency", "2"]

    def given(name: str, ranks: int) -> list[str]:
        batch = str(GLOBAL_BATCH // ranks)
        return [*own, "--output_dir", str(folder / name), "--per_device_train_batch_size", batch]

    plain = start([sys.executable, script, *given("plain", 1)], folder)
    zero = ["--deepspeed", str(EXAMPLES / "ds_zero2.json")]
    sharded = start([*torchrun(2), script, *given("zero", 2), *zero], folder)
    assert_falling(losses(plain))
    assert losses(sharded) == pytest.approx(losses(plain), rel=1e-4)

    monkeypatch.syspath_prepend(str(EXAMPLES))
    from finetune_demo import FIGURES, Run, draw, table

    found = [Run.read(name, 1e-3, folder / name) for name in ("plain", "zero")]
    for one in found:
        assert one.steps == [0, 2, 4] and one.figures.keys() == FIGURES.keys()
        assert one.figures["eval_task_loss"][-1] < one.figures["eval_task_loss"][0]
    assert found[0].figures["eval_task_loss"] == pytest.approx(found[1].figures["eval_task_loss"], rel=1e-3)
    draw(found, folder / "picture.png")
    assert (folder / "picture.png").stat().st_size > 10_000 and len(table(found).splitlines()) == 4
    log = read_log(folder / "plain")
    assert {"loss", "learning_rate", "refresh_ms", "eval_task_accuracy", "eval_general_loss"} <= set(log.series)


def test_adapters_are_fine_tuned_with_either_optimizer(ddp: tuple[list[float], Path], folder: Path) -> None:
    for optimizer in ("shampoo", "adamw"):
        given = ["--model", str(ddp[1]), "--sequence_length", "128", "--held_out_rows", "8", "--general_rows", "4"]
        given += ["--max_steps", "16", "--learning_rate", "5e-2", "--lora_rank", "4", "--use_cpu"]
        given += ["--warmup_steps", "0", "--precondition_frequency", "2"]
        given += ["--optimizer", optimizer, "--output_dir", str(folder / f"lora_{optimizer}")]
        assert_falling(losses(start([sys.executable, EXAMPLES / "finetune.py", *given], folder)), 16)


def test_causal_lm_deepspeed(folder: Path) -> None:
    saved = folder / "deepspeed"
    given = [*arguments(folder, 2), *NEW_MODEL, "--output_dir", str(saved), "--logging_steps", "1"]
    start([*torchrun(2), EXAMPLES / "causal_lm_deepspeed.py", *given, "--eval_sequences", "4"], folder)
    log = json.loads((saved / "loss_log.json").read_text())
    assert_falling([record["loss"] for record in log["train"]])
    assert log["ranks"] == 2 and log["eval_loss"] < log["train"][0]["loss"]


def test_the_table_of_block_sizes_in_the_lora_example_is_true() -> None:
    """It shows how many numbers the factor matrices of a 16 x 4096 matrix have."""
    rows = re.findall(r"^    (\d+)\S* .*?(\d+\.\d+) million", (EXAMPLES / "lora_trainer.py").read_text(), re.MULTILINE)
    assert [int(block) for block, _ in rows] == [4096, 1024, 64, 16]
    for block, millions in rows:
        numbers = sum(n * n for box in cut_into_blocks((16, 4096), int(block)) for n in box.lengths)
        assert f"{numbers / 1e6:.1f}" == millions or f"{numbers / 1e6:.2f}" == millions
