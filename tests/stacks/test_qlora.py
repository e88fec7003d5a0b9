"""A frozen base model in 4 bits under LoRA, as Unsloth and QLoRA train it: only the adapters move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from shampoo_deepspeed import Shampoo
from shampoo_deepspeed.state.unwrap import inner_optimizer
from tests.support.stack_runs import assert_learned
from tests.support.tiny_text import LINE


def test_adapters_over_four_bits_are_trained(text: Path, tmp_path: Path) -> None:
    import shampoo_deepspeed.integrations.optim_shampoo  # noqa: F401

    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model: Any = AutoModelForCausalLM.from_pretrained(text / "model", quantization_config=bits, device_map="cpu")
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    tokenizer = AutoTokenizer.from_pretrained(text / "model")
    tokenizer.pad_token = tokenizer.eos_token = "?"
    args = SFTConfig(
        str(tmp_path), optim="shampoo", learning_rate=1e-2, max_steps=8, report_to="none", use_cpu=True, bf16=False,
        logging_steps=1, max_length=16, save_strategy="no", disable_tqdm=True, per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = SFTTrainer(
        model, args=args, train_dataset=Dataset.from_dict({"text": [LINE] * 40}), processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )  # fmt: skip
    packed = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    trainer.train()
    optimizer = inner_optimizer(trainer.optimizer)
    assert isinstance(optimizer, Shampoo) and all("lora_" in name for name in optimizer.policies)
    assert packed and all(torch.equal(p, packed[n]) for n, p in trainer.model.named_parameters() if n in packed)
    assert_learned([entry["loss"] for entry in trainer.state.log_history if "loss" in entry], 0.02)
