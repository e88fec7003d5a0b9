"""Trains a causal language model with the Hugging Face Trainer under FSDP2; Shampoo is its `optimizers=`.

    accelerate launch --config_file examples/fsdp2.yaml --num_processes 8 examples/fsdp2_trainer.py --bf16
    torchrun --nproc_per_node 8 examples/fsdp2_trainer.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/fsdp2_trainer.py      # two CPU ranks: DDP, see below

The first command takes FSDP's settings from the YAML file, the second one from the Trainer's `--fsdp` (on by default
here) and `--fsdp_config`. The stock Trainer refuses `optimizers=` under FSDP; ShampooTrainer takes it, and `deferred`
builds Shampoo once the model has been built. All arguments of the Trainer work (`--learning_rate`, ...).

On CPUs accelerate silently ignores FSDP and replicates the model, so this script then trains with DDP.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import HfArgumentParser, TrainingArguments, set_seed

from language_model import (
    NOWHERE,
    TRAINER_DEFAULTS,
    LanguageModelArguments,
    PrintLoss,
    ShampooArguments,
    build_model,
    load_trainer_text,
)
from shampoo_deepspeed.integrations.trainer import ShampooTrainer, deferred

# Differences from the Trainer's own defaults; the command line overrides each.
DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    # Under `accelerate launch` the YAML file configures FSDP.
    "fsdp": "ACCELERATE_USE_FSDP" not in os.environ,
}


def main() -> None:
    parser = HfArgumentParser((LanguageModelArguments, ShampooArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    example, shampoo, training = parser.parse_args_into_dataclasses()
    set_seed(training.seed)
    tokenizer, sequences = load_trainer_text(example, training)
    model = build_model(example, tokenizer)

    trainer = ShampooTrainer(
        model=model,
        args=training,
        train_dataset=sequences,
        processing_class=tokenizer,
        callbacks=[PrintLoss],
        optimizers=(deferred(lr="auto", weight_decay="auto", **shampoo.options()), None),
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if training.output_dir != NOWHERE:
        trainer.save_model()


if __name__ == "__main__":
    main()
