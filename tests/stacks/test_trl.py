"""TRL's trainers take Shampoo by its name after an import, and by the mixin; runs continue where they were saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RewardConfig, RewardTrainer

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.support.snippets import run_stack_block
from tests.support.stack_runs import assert_learned, assert_recognised
from tests.support.tiny_text import LINE

TOKENS, HEAD = "embed_tokens.weight", "lm_head.weight"
STEPS = 8
BY_NAME: dict[str, Any] = {"optim": "shampoo", "optim_args": "precondition_frequency=3"}


def settings(folder: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "learning_rate": 3e-3, "weight_decay": 0.1, "report_to": "none",
        "use_cpu": True, "bf16": False, "logging_steps": 1, "per_device_train_batch_size": 4, "save_strategy": "no",
        "disable_tqdm": True, "gradient_checkpointing": True,
    }  # fmt: skip
    return given | changes


def language_model(text: Path) -> Any:
    torch.manual_seed(3)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(text / "model"))


def tokenizer(text: Path) -> Any:
    found = AutoTokenizer.from_pretrained(text / "model")
    found.pad_token = found.eos_token = "?"
    found.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return found


def lines(kind: str) -> Dataset:
    words = LINE.split()
    halves: dict[str, list[str]] = {
        "sft": {"text": [LINE] * 40},
        "dpo": {"prompt": [" ".join(words[:6])] * 40, "chosen": [" ".join(words[6:])] * 40, "rejected": ["a its"] * 40},
        "grpo": {"prompt": [" ".join(words[:4])] * 40},
        "reward": {"chosen": [LINE] * 40, "rejected": [" ".join(reversed(words))] * 40},
    }[kind]
    return Dataset.from_dict(halves)


def dpo(text: Path, folder: Path) -> Any:
    args = DPOConfig(**settings(folder), **BY_NAME)
    return DPOTrainer(language_model(text), args=args, train_dataset=lines("dpo"), processing_class=tokenizer(text))


def grpo(text: Path, folder: Path) -> Any:
    def short(completions: list[str], **_: Any) -> list[float]:
        return [float(len(set(text.split()))) for text in completions]

    args = GRPOConfig(**settings(folder, max_steps=3), **BY_NAME, num_generations=2, max_completion_length=4)
    return GRPOTrainer(
        language_model(text), short, args=args, train_dataset=lines("grpo"), processing_class=tokenizer(text)
    )


def reward(text: Path, folder: Path) -> Any:
    config = AutoConfig.from_pretrained(text / "model", num_labels=1, pad_token_id=0)
    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_config(config)
    args = RewardConfig(**settings(folder), **BY_NAME)
    return RewardTrainer(model, args=args, train_dataset=lines("reward"), processing_class=tokenizer(text))


def sft(text: Path, folder: Path, block: str = "trl", **changes: Any) -> Any:
    given = {"model": language_model(text), "tokenizer": tokenizer(text), "data": lines("sft")}
    return run_stack_block(block, **given, settings=settings(folder, max_length=16, **changes))["trainer"]


def logged(trainer: Any, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


TRAINERS: dict[str, Callable[[Path, Path], Any]] = {"sft": sft, "dpo": dpo, "grpo": grpo, "reward": reward}


@pytest.mark.parametrize("kind", TRAINERS)
def test_every_trainer_takes_the_name(kind: str, text: Path, tmp_path: Path) -> None:
    trainer = TRAINERS[kind](text, tmp_path)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    if kind == "reward":  # its head has one output for the sequence, not one for each token
        inner = inner_optimizer(trainer.optimizer)
        assert isinstance(inner, Shampoo) and not inner.policies["model.embed_tokens.weight"].preconditioned
    else:
        assert_recognised(trainer.optimizer, TOKENS, HEAD)
    if kind != "grpo":  # whose loss is not expected to fall in three steps
        assert_learned(logged(trainer, "loss"), 0.02)
    assert not all(map(torch.equal, before, trainer.model.parameters()))
    rates = logged(trainer, "learning_rate")
    assert rates[0] == 3e-3 and rates == sorted(rates, reverse=True) and rates[-1] < rates[0]


@pytest.mark.parametrize("block", ["trl", "trl-mixin"])
def test_a_run_continues_where_it_was_saved(block: str, text: Path, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    whole = sft(text, tmp_path, block, **saving)
    whole.train()
    again = sft(text, tmp_path, block, **saving)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert isinstance(inner_optimizer(again.optimizer), Shampoo)
    assert logged(again, "loss") == logged(whole, "loss")
    assert all(map(torch.equal, again.model.parameters(), whole.model.parameters()))


def test_lora_s_adapters_alone_are_trained(text: Path, tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    trainer = SFTTrainer(
        language_model(text), args=SFTConfig(**settings(tmp_path, max_length=16), **BY_NAME),
        train_dataset=lines("sft"), processing_class=tokenizer(text), peft_config=LoraConfig(r=4),
    )  # fmt: skip
    trainer.train()
    optimizer = inner_optimizer(trainer.optimizer)
    assert isinstance(optimizer, Shampoo) and all("lora_" in name for name in optimizer.policies)
    assert all(policy.preconditioned for policy in optimizer.policies.values())
    assert_learned(logged(trainer, "loss"), 0.02)
