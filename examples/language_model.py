"""What the examples share: their arguments, a causal language model, and token sequences in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
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

TOKENIZER_CHARACTERS = 2_000_000  # what a new tokenizer is trained on
NOWHERE = str(Path(tempfile.gettempdir()) / "shampoo_example")  # the Trainer wants a folder where nothing is saved too


@dataclass
class LanguageModelArguments:
    """Which model, on which text."""

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
    """The options of Shampoo that matter most; all of them are in the README."""

    precondition_frequency: int = field(default=10, metadata={"help": "Steps between two refreshes of the roots"})
    max_preconditioner_dim: int = field(default=256, metadata={"help": "Block size; 1024 on GPUs"})
    grafting: str = field(default="adam", metadata={"help": "Whose step length each block takes"})

    def options(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class LoopArguments:
    """A plain training loop; the Trainer has these names too."""

    max_steps: int = field(default=100, metadata={"help": "Optimizer steps"})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Sequences per rank and step"})
    learning_rate: float = field(default=3e-3)
    weight_decay: float = field(default=0.1)
    max_grad_norm: float = field(default=1.0)
    seed: int = field(default=42)
    use_cpu: bool = field(default=False, metadata={"help": "Also where there are accelerators"})
    output_dir: str | None = field(default=None, metadata={"help": "Where the model goes; default: nowhere"})


class PrintLoss(TrainerCallback):
    """One line per logged loss, on the first rank."""

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


def load_text(arguments: LanguageModelArguments, rows: int, seed: int) -> tuple[PreTrainedTokenizerBase, Tensor]:
    """The tokenizer, and int64 [rows, sequence_length] in random order; the same on every rank, nothing is written."""
    files = find_text_files(arguments.text_dir)
    if arguments.model is not None:
        tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    else:
        texts = first_characters(read_documents(files, seed), TOKENIZER_CHARACTERS)
        tokenizer = train_tokenizer(texts, arguments.vocab_size)
    sequences = token_rows(read_documents(files, seed), tokenizer, rows, arguments.sequence_length)
    return tokenizer, sequences[torch.randperm(rows, generator=torch.Generator().manual_seed(seed))]


def build_model(arguments: LanguageModelArguments, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The given model, or a new small Llama; weights in float32, which hosts cast under --bf16."""
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


def as_dataset(rows: Tensor) -> list[dict[str, Tensor]]:
    """What a Trainer takes; every token but the first is a target."""
    return [{"input_ids": row, "labels": row} for row in rows]


def batches(rows: Tensor, rank: int, ranks: int, steps: int) -> Iterator[Tensor]:
    """This rank's part of each step's global batch: the same rows per step on any number of ranks."""
    for batch in rows.chunk(steps):
        yield batch.chunk(ranks)[rank]
