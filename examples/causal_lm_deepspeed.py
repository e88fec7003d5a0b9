"""Trains a causal language model with the Hugging Face Trainer on DeepSpeed; the JSON names the optimizer.

    deepspeed examples/causal_lm_deepspeed.py --output_dir out                  # every GPU of this machine
    deepspeed examples/causal_lm_deepspeed.py --model HuggingFaceTB/SmolLM2-135M --text_dir my_texts/ --bf16
    OMP_NUM_THREADS=1 torchrun --nproc_per_node 2 examples/causal_lm_deepspeed.py       # two CPU ranks

Nothing here mentions Shampoo: `"type": "Shampoo"` in ds_zero2_shampoo.json is enough if shampoo-deepspeed is
installed. `--deepspeed examples/ds_zero2_adamw.json` runs the same training with AdamW. All arguments of
the Trainer work (`--learning_rate`, `--max_steps`, `--resume_from_checkpoint`, ...).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset, load_from_disk
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from deepspeed_start import HAS_ACCELERATOR, prepare_deepspeed
from language_model import LanguageModelArguments, build_model, make_tokenizer
from text_data import find_text_files, load_documents, pack_tokens, split_held_out

HERE = Path(__file__).resolve().parent

# Differences from the Trainer's own defaults; the command line overrides each.
DEFAULTS: dict[str, Any] = {
    "deepspeed": str(HERE / "ds_zero2_shampoo.json"),
    "learning_rate": 3e-3,
    "adam_beta2": 0.95,
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "logging_steps": 5,
    # With the filter, a diverged run would show its last finite loss.
    "logging_nan_inf_filter": False,
    "use_cpu": not HAS_ACCELERATOR,
}


@dataclass
class ExampleArguments(LanguageModelArguments):
    """The model, the text, and how much of it is held out."""

    eval_sequences: int = field(default=256, metadata={"help": "Held-out sequences, at most a twentieth of all"})


class LossInProgressBar(ProgressCallback):
    """Shows the loss in the progress bar, and keeps it with the time since training began."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, float]] = []
        self.began = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self.began = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        seconds = time.perf_counter() - self.began
        self.records.append({"step": state.global_step, "loss": logs["loss"], "seconds": seconds})
        if self.training_bar is not None:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.3f}", lr=f"{logs['learning_rate']:.1e}")


def prepare_data(
    example: ExampleArguments, training: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, Dataset, Dataset]:
    """Return the tokenizer and the sequences: one rank per machine writes them to files, all ranks read the files."""
    files = find_text_files(example.text_dir)
    folder = Path(training.output_dir) / "data"
    tokenizer_at, rows_at = folder / "tokenizer", folder / "sequences"
    with training.main_process_first(desc="tokenizing"):
        if training.local_process_index == 0:
            documents = load_documents(files, folder / "cache").shuffle(seed=training.seed)
            tokenizer = make_tokenizer(example, (batch["text"] for batch in documents.iter(batch_size=64)))
            tokenizer.save_pretrained(tokenizer_at)
            pack_tokens(documents, tokenizer, example.sequence_length).save_to_disk(rows_at)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_at)
        rows = load_from_disk(rows_at)
    train, held_out = split_held_out(rows, 0.05, example.eval_sequences)
    return tokenizer, train, held_out


def main() -> None:
    parser = HfArgumentParser((ExampleArguments, TrainingArguments))
    parser.set_defaults(**DEFAULTS)
    example, training = parser.parse_args_into_dataclasses()
    prepare_deepspeed(training.use_cpu)
    set_seed(training.seed)
    tokenizer, train, held_out = prepare_data(example, training)
    model = build_model(example, tokenizer)
    progress = LossInProgressBar()
    trainer = Trainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(progress)
    # Under ZeRO-3 the tensors themselves are already empty here.
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
    if trainer.is_world_process_zero():
        print(f"{parameters / 1e6:.1f} M parameters, {len(train)} sequences of {example.sequence_length} tokens")

    result = trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    eval_loss = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    if trainer.is_world_process_zero():
        steps = trainer.state.global_step
        log = {
            "train": progress.records,
            "eval_loss": eval_loss,
            "steps": steps,
            "seconds": result.metrics["train_runtime"],
            "ranks": training.world_size,
            "parameters": parameters,
        }
        (Path(training.output_dir) / "loss_log.json").write_text(json.dumps(log, indent=1))
        print(f"held-out loss {eval_loss:.3f} after {steps} steps: {training.output_dir}")


if __name__ == "__main__":
    main()
