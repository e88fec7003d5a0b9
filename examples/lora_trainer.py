"""Fine-tunes LoRA adapters of a causal language model with Shampoo: plain, under DDP, or under DeepSpeed ZeRO-2.

    python examples/lora_trainer.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/
    deepspeed examples/lora_trainer.py --deepspeed examples/ds_zero2.json --model HuggingFaceTB/SmolLM2-135M
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/lora_trainer.py --deepspeed examples/ds_zero2.json

An adapter of rank r on a layer of width d is a pair of matrices, A [r, d] and B [d, r]. Their short side has a factor
matrix of r x r numbers; the long side would have one of d x d, many times the adapter itself. Shampoo cuts long sides
into blocks of b = `max_preconditioner_dim`, so this is the option to set. It gives d / b factor matrices of b x b, or
d * b numbers for the d * r of the adapter. For r = 16 and d = 4096, one matrix of 65,536 numbers:

    --max_preconditioner_dim    numbers in factor matrices
    4096                        16.8 million (256 times the matrix)
    1024, Shampoo's default      4.2 million (64 times)
    64, the default here         0.28 million (4 times)
    16, the rank                 0.13 million (twice)

A block size below the rank would cut the short side too, which gains nothing. DeepSpeed's JSON holds no "optimizer"
here: Shampoo is passed as the Trainer's `optimizers=`, with or without DeepSpeed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import HfArgumentParser, TrainingArguments, set_seed

from deepspeed_start import HAS_ACCELERATOR, prepare_deepspeed
from language_model import (
    NOWHERE,
    TRAINER_DEFAULTS,
    LanguageModelArguments,
    PrintLoss,
    build_model,
    load_trainer_text,
)
from shampoo_deepspeed.geometry.blocks import cut_into_blocks
from shampoo_deepspeed.integrations.trainer import ShampooTrainer, deferred

# Differences from the Trainer's own defaults; the command line overrides each.
DEFAULTS: dict[str, Any] = {
    **TRAINER_DEFAULTS,
    "learning_rate": 1e-3,
    "use_cpu": not HAS_ACCELERATOR,
}


@dataclass
class LoraArguments:
    """The LoRA adapters, and Shampoo's options for them."""

    lora_rank: int = field(default=16, metadata={"help": "r"})
    lora_alpha: int = field(default=32, metadata={"help": "Adapters are scaled by lora_alpha / r"})
    lora_dropout: float = field(default=0.0)
    target_modules: str = field(default="all-linear", metadata={"help": "Which layers get an adapter"})
    precondition_frequency: int = field(default=10, metadata={"help": "Steps between two refreshes of the roots"})
    max_preconditioner_dim: int | None = field(
        default=None, metadata={"help": "Block size; default: four times the rank"}
    )


def preconditioning(lora: LoraArguments) -> dict[str, Any]:
    """Return Shampoo's options for matrices with one short side. Nothing else here is special to LoRA."""
    return {
        "preset": "lora",
        "max_preconditioner_dim": lora.max_preconditioner_dim or 4 * lora.lora_rank,
        "precondition_frequency": lora.precondition_frequency,
    }


def numbers_in_factors(model: nn.Module, block: int) -> int:
    """Return how many numbers the factor matrices of the trained matrices have, at a block size."""
    matrices = [tuple(p.shape) for p in model.parameters() if p.requires_grad and p.ndim == 2]
    return sum(n * n for shape in matrices for box in cut_into_blocks(shape, block) for n in box.lengths)


def main() -> None:
    parser = HfArgumentParser((LanguageModelArguments, LoraArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    example, lora, training = parser.parse_args_into_dataclasses()
    if training.deepspeed:
        prepare_deepspeed(training.use_cpu)
    set_seed(training.seed)
    tokenizer, sequences = load_trainer_text(example, training)
    adapters = LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_rank,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
    )
    model = get_peft_model(build_model(example, tokenizer), adapters)
    options = preconditioning(lora)

    trainer = ShampooTrainer(
        model=model,
        args=training,
        train_dataset=sequences,
        processing_class=tokenizer,
        callbacks=[PrintLoss],
        optimizers=(deferred(lr="auto", weight_decay="auto", **options), None),
    )
    if trainer.is_world_process_zero():
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        factors = numbers_in_factors(model, options["max_preconditioner_dim"])
        print(f"{trained} trained parameters, {factors} numbers in factor matrices", flush=True)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if training.output_dir != NOWHERE:
        trainer.save_model()  # the adapters alone


if __name__ == "__main__":
    main()
