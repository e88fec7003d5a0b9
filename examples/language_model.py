"""Code that the examples share: their arguments, a causal language model, and token sequences in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from text_data import find_text_files, first_characters, read_documents, token_rows, train_tokenizer

TOKENIZER_CHARACTERS = 2_000_000  # length of the text that a new tokenizer is trained on
NOWHERE = str(Path(tempfile.gettempdir()) / "shampoo_example")  # the Trainer wants a folder even if nothing is saved

# Differences from the Trainer's own defaults in examples that print each loss and keep nothing.
TRAINER_DEFAULTS: dict[str, Any] = {
    "output_dir": NOWHERE,
    "save_strategy": "no",
    "max_steps": 100,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # with the filter, a diverged run would show its last finite loss
    "report_to": "none",
}


@dataclass
class LanguageModelArguments:
    """The model and the text."""

    model: str | None = field(default=None, metadata={"help": "Hub id or folder; default: a small new Llama"})
    text_dir: str | None = field(
        default=None, metadata={"help": "File or folder; default: Python's library", "aliases": ["--text"]}
    )
    sequence_length: int = field(default=128, metadata={"help": "Tokens per training sequence"})
    vocab_size: int = field(default=2048, metadata={"help": "Of the tokenizer trained for a new model"})
    hidden_size: int = field(default=192, metadata={"help": "Of a new model; a multiple of 32"})
    num_layers: int = field(default=4, metadata={"help": "Of a new model"})


@dataclass
class ShampooArguments:
    """The options of Shampoo that matter most; docs/options.md lists all."""

    precondition_frequency: int = field(default=10, metadata={"help": "Steps between two refreshes of the roots"})
    max_preconditioner_dim: int = field(default=256, metadata={"help": "Block size; 1024 on GPUs"})
    grafting: str = field(default="adam", metadata={"help": "Method whose norm each block's update gets"})

    def options(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class LoopArguments:
    """Arguments of a plain training loop, with the Trainer's names."""

    max_steps: int = field(default=100, metadata={"help": "Optimizer steps"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per rank and step"})
    learning_rate: float = field(default=3e-3)
    weight_decay: float = field(default=0.1)
    max_grad_norm: float = field(default=1.0)
    seed: int = field(default=42)
    use_cpu: bool = field(default=False, metadata={"help": "Use the CPU even if there are accelerators"})
    bf16: bool = field(default=False, metadata={"help": "Compute in bfloat16; weights stay float32"})
    output_dir: str | None = field(default=None, metadata={"help": "Folder for the model; default: it is not saved"})

    def options(self) -> dict[str, Any]:
        """Return Shampoo's options among these; norms and biases do not decay, as with the Trainer."""
        return {"lr": self.learning_rate, "weight_decay": self.weight_decay, "no_decay": ["*norm*", "*bias*"]}


class PrintLoss(TrainerCallback):
    """Prints one line per logged loss, on the first rank."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and logs and "loss" in logs:
            print(f"step {state.global_step} loss {float(logs['loss']):.6f}", flush=True)


def make_tokenizer(
    arguments: LanguageModelArguments, texts: Iterable[str] | Iterable[list[str]]
) -> PreTrainedTokenizerBase:
    """Return the given model's tokenizer or, for a new model, one that is trained on the texts."""
    if arguments.model is not None:
        return AutoTokenizer.from_pretrained(arguments.model)
    return train_tokenizer(texts, arguments.vocab_size)


def load_trainer_text(
    arguments: LanguageModelArguments, training: TrainingArguments
) -> tuple[PreTrainedTokenizerBase, list[dict[str, Tensor]]]:
    """Return the tokenizer, and as many sequences as a Trainer takes; every token but the first is a target."""
    rows = training.max_steps * training.train_batch_size * training.world_size * training.gradient_accumulation_steps
    tokenizer, sequences = load_text(arguments, rows, training.seed)
    return tokenizer, [{"input_ids": row, "labels": row} for row in sequences]


def load_text(arguments: LanguageModelArguments, rows: int, seed: int) -> tuple[PreTrainedTokenizerBase, Tensor]:
    """Return the tokenizer, and int64 [rows, sequence_length] in random order, the same on every rank."""
    files = find_text_files(arguments.text_dir)
    tokenizer = make_tokenizer(arguments, first_characters(read_documents(files, seed), TOKENIZER_CHARACTERS))
    sequences = token_rows(read_documents(files, seed), tokenizer, rows, arguments.sequence_length)
    return tokenizer, sequences[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]


def build_model(arguments: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Build the given model, or a new small Llama, with float32 weights, which frameworks cast under --bf16."""
    if arguments.model is not None:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.hidden_size * 8 // 3,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.hidden_size // 32,
        max_position_embeddings=arguments.sequence_length,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config(config)
