"""axolotl reads its configuration with our plugin, and its own builder's trainer trains with Shampoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.core.builders import HFCausalTrainerBuilder
from axolotl.utils.dict import DictDefault
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from shampoo_deepspeed.integrations.axolotl import ShampooPlugin
from tests.support.snippets import stack_block
from tests.support.stack_runs import assert_learned, assert_recognised
from tests.support.tiny_text import LINE

STEPS = 8


def configuration(text: Path, folder: Path) -> Any:
    """The block of the page in a configuration file, as axolotl's command line loads it."""
    from axolotl.cli.config import load_cfg

    rest = {
        "base_model": str(text / "model"), "output_dir": str(folder / "out"), "sequence_len": 16, "max_steps": STEPS,
        "datasets": [{"path": str(text / "text.txt"), "type": "completion", "ds_type": "text"}],
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "lr_scheduler": "cosine", "bf16": False,
        "save_steps": 4, "logging_steps": 1, "special_tokens": {"pad_token": "?"}, "val_set_size": 0,
        "dataset_prepared_path": str(folder / "prepared"), "telemetry": False, "use_cpu": True,
    }  # fmt: skip
    (folder / "train.yaml").write_text(stack_block("axolotl") + yaml.safe_dump(rest))
    return load_cfg(str(folder / "train.yaml"))


def test_the_trainer_of_its_builder_trains_with_shampoo(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AXOLOTL_DO_NOT_TRACK", "1")
    cfg = configuration(text, tmp_path)
    assert cfg.optimizer == "shampoo"
    tokenizer = AutoTokenizer.from_pretrained(text / "model")
    tokenizer.pad_token = "?"
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(text / "model"))
    ids = tokenizer(LINE)["input_ids"]
    rows = {"input_ids": [ids] * 40, "labels": [ids] * 40, "attention_mask": [[1] * len(ids)] * 40}
    builder = HFCausalTrainerBuilder(cfg, model, tokenizer, None)
    builder.train_dataset = Dataset.from_dict(rows)
    trainer = builder.build(STEPS)
    trainer.train()
    inner = assert_recognised(trainer.optimizer, "embed_tokens.weight", "lm_head.weight")
    assert inner.param_groups[0]["betas"] == (0.9, 0.95) and inner.param_groups[0]["precondition_frequency"] == 5
    assert_learned([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_a_plugin_without_the_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="axolotl would train with optimizer: adamw_torch, though ShampooPlugin"):
        ShampooPlugin().register(DictDefault({"optimizer": "adamw_torch"}))


@pytest.mark.parametrize("key", ["loraplus_lr_ratio", "embedding_lr", "embedding_lr_scale", "lr_groups"])
def test_axolotl_s_own_groups_are_an_error(key: str) -> None:
    with pytest.raises(ValueError, match=f"does not work together with axolotl's {key}"):
        ShampooPlugin().register(DictDefault({"optimizer": "shampoo", key: 2.0}))
