"""Lightning's Trainer and Fabric train with Shampoo, divide its work under DDP, and continue saved runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from shampoo_deepspeed import LayoutError
from tests.stacks.losses import Losses
from tests.support.commands import run, torchrun
from tests.support.snippets import run_stack_block
from tests.support.stack_runs import STEPS, assert_learned, assert_recognised, batches
from tests.support.trainings import make_model

TOKENS, HEAD = "embed_tokens.weight", "lm_head.weight"
SCRIPT = Path(__file__).with_name("lightning_script.py")


def fitted(folder: Path, **given: Any) -> tuple[Trainer, Losses, Any]:
    module = run_stack_block("lightning")["Module"](make_model("llama"))
    seen, saving = Losses(), ModelCheckpoint(folder, every_n_train_steps=STEPS // 2, save_top_k=-1, filename="{step}")
    trainer = Trainer(
        max_steps=STEPS, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[seen, saving], default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches(), batch_size=None), **given)  # type: ignore[arg-type]
    return trainer, seen, module


def test_the_trainer_trains_and_continues(tmp_path: Path) -> None:
    trainer, whole, module = fitted(tmp_path)
    inner = assert_recognised(trainer.optimizers[0], TOKENS, HEAD)
    assert inner.policies["model.model.embed_tokens.weight"].rate == "embedding_lr"
    assert_learned(whole.losses)
    assert whole.rates == sorted(whole.rates, reverse=True) and whole.rates[-1] < 3e-3
    half = tmp_path / f"step={STEPS // 2}.ckpt"
    _, rest, again = fitted(tmp_path / "again", ckpt_path=str(half))
    assert rest.losses == whole.losses[STEPS // 2 :] and rest.rates == whole.rates[STEPS // 2 :]
    assert all(map(torch.equal, again.parameters(), module.parameters()))


def test_a_layer_that_is_new_since_the_optimizer_was_built_is_an_error(tmp_path: Path) -> None:
    Module: Any = run_stack_block("lightning")["Module"]

    class Late(Module):
        def on_train_start(self) -> None:
            self.model.lm_head = nn.Linear(32, self.model.config.vocab_size, bias=False)

    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with pytest.raises(LayoutError, match=r"\(model.lm_head.weight\).*build the optimizer from the model as it is now"):
        trainer.fit(Late(make_model("llama")), DataLoader(batches(), batch_size=None))  # type: ignore[arg-type]


def test_fabric_trains_and_continues(tmp_path: Path) -> None:
    losses: list[float] = []
    made = run_stack_block("fabric", model=make_model("llama"), batches=batches(6), losses=losses)
    assert_recognised(made["optimizer"], TOKENS, HEAD)
    state = {"model": made["model"], "optimizer": made["optimizer"]}
    made["fabric"].save(tmp_path / "state.ckpt", state)
    fresh = run_stack_block("fabric", model=make_model("llama"), batches=[], losses=[])
    fresh["fabric"].load(tmp_path / "state.ckpt", {"model": fresh["model"], "optimizer": fresh["optimizer"]})
    tails = []
    for one in (made, fresh):
        tail = []
        for batch in batches(6):
            loss = one["model"](**batch).loss
            one["fabric"].backward(loss)
            one["optimizer"].step()
            one["optimizer"].zero_grad()
            tail.append(loss.item())
        tails.append(tail)
    assert_learned(losses + tails[0])
    assert tails[0] == tails[1]


STRATEGIES = ("ddp", "fsdp1", "fsdp2", "zero2", "zero3")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_ranks_train_as_one_and_continue_or_say_why_not(strategy: str, tmp_path: Path) -> None:
    _, whole, _ = fitted(tmp_path)
    run([*torchrun(2), SCRIPT, strategy, tmp_path], tmp_path, LOCAL_SIZE="2")
    ranks = [json.loads((tmp_path / f"{strategy}-{rank}.json").read_text()) for rank in range(2)]
    means = [sum(pair) / 2 for pair in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert means == pytest.approx(whole.losses, abs=1e-4)
    # Under DDP each rank does all of the work, as Lightning saves the state of one rank.
    assert (sum(rank["bytes"] for rank in ranks) > 0) == (strategy != "ddp")
    for rank in ranks:
        assert rank["rates"] == pytest.approx(whole.rates)
        assert [name.removeprefix("model.") for name in rank["left_out"]] == [HEAD, f"model.{TOKENS}"]
        if strategy == "fsdp1":  # whose own state dict of an optimizer holds torch's per-parameter tensors only
            assert "cannot carry Shampoo's state; use save_shampoo(optimizer, path)" in rank["refused"]
            continue
        assert rank["resumed"] == pytest.approx(rank["losses"][STEPS // 2 :], rel=1e-6)
        assert rank["resumed_rates"] == pytest.approx(rank["rates"][STEPS // 2 :])
