"""The runs of whole scripts: their command lines and environments under each framework."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.launch import ROOT

STEPS, RATE = 8, 1e-2
HALF = STEPS // 2
FRAMEWORKS = ("zero1", "zero2", "zero3", "fsdp2")
STANDIN = "tests/distributed/standin/"
CONFIG = "framework.json"


@dataclass(frozen=True)
class ScriptRun:
    """One script under one framework.

    Args:
        script: its file, from the root of the repository, or the name of an installed module.
        framework: one of FRAMEWORKS.
        written: the JSON files in its output folder that say how it went.
        last: the last checkpoint in that folder; a second run continues from the one before.
        by_name: whether it is started through `optim_shampoo`, and asks for Shampoo by `--optim`.
    """

    script: str
    framework: str
    written: tuple[str, ...]
    last: str
    by_name: bool = False

    @property
    def of_trainer(self) -> bool:
        return "no_trainer" not in self.script

    def arguments(self, folder: Path, ranks: int) -> list[str]:
        """Return the command line."""
        given: dict[str, Any] = {"output_dir": folder / "out", "per_device_train_batch_size": 8 // ranks}
        given |= {"learning_rate": RATE, "weight_decay": 0.1, "lr_scheduler_type": "cosine", "seed": 1}
        given |= self._of_data(folder)
        given |= self._of_the_trainer(folder) if self.of_trainer else {"max_train_steps": STEPS}
        if not self.of_trainer:
            given |= {"num_warmup_steps": 2, "checkpointing_steps": HALF}
        return [text for key, value in given.items() for text in (f"--{key}", str(value))]

    def resuming(self, folder: Path) -> list[str]:
        """Return what a second run needs on its command line; run_clm.py finds the checkpoint by itself."""
        if "run_clm.py" in self.script:
            return []
        checkpoint = f"checkpoint-{HALF}" if self.of_trainer else f"step_{HALF}"
        return ["--resume_from_checkpoint", str(folder / "out" / checkpoint)]

    def environment(self, folder: Path) -> dict[str, str]:
        """Return what `accelerate launch` sets; the Trainer's own arguments say the rest."""
        found = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
        if self.of_trainer:
            return found
        if self.framework == "fsdp2":
            found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
            return found | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "ACCELERATE_MIXED_PRECISION": "bf16"}
        file = str(folder / CONFIG)
        return found | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": file}

    def configuration(self) -> dict[str, Any]:
        """Return the framework's JSON. It has the optimizer if that is not asked for in another way."""
        if self.framework == "fsdp2":
            return {"version": 2}
        zero = {"stage": int(self.framework[4]), "stage3_gather_16bit_weights_on_model_save": True}
        sizes = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
        config: dict[str, Any] = {"zero_optimization": zero, "bf16": {"enabled": True}, **sizes}
        if not self.of_trainer:
            return config | {"gradient_clipping": 1.0, "gradient_accumulation_steps": 1}
        config |= {"gradient_clipping": "auto", "train_batch_size": "auto"}
        if not self.by_name:
            params = dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")
            config["optimizer"] = {"type": "Shampoo", "params": {"precondition_frequency": 3} | params}
        return config

    def command(self, arguments: list[str]) -> list[str]:
        """Return what follows `python`."""
        return [str(ROOT / self.script), *arguments] if self.script.endswith(".py") else ["-m", self.script, *arguments]

    def _of_data(self, folder: Path) -> dict[str, Any]:
        if not self.script.endswith(".py"):
            return {"model_name_or_path": folder / "model", "dataset_name": folder / "lines", "max_length": 16}
        return {
            "config_name": folder / "model", "tokenizer_name": folder / "model", "train_file": folder / "text.txt",
            "validation_file": folder / "other.txt",
        }  # fmt: skip

    def _of_the_trainer(self, folder: Path) -> dict[str, Any]:
        """The Trainer's arguments: the best model is the first that is evaluated, as the other text is unlike."""
        given: dict[str, Any] = {
            "bf16": True, "gradient_checkpointing": True, "use_cpu": True,
            "max_steps": STEPS, "save_steps": HALF, "eval_strategy": "steps", "eval_steps": HALF, "logging_steps": 1,
            "load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False,
            "warmup_steps": 2, "report_to": "none", "disable_tqdm": True,
        }  # fmt: skip
        if self.script.endswith(".py"):
            given |= {"do_train": True, "do_eval": True}
        if self.by_name:
            given |= {"optim": "shampoo", "optim_args": "precondition_frequency=3"}
        if self.framework == "fsdp2":
            return given | {"fsdp": "full_shard", "fsdp_config": folder / CONFIG}
        return given | {"deepspeed": folder / CONFIG}
