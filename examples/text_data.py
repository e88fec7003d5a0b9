"""Makes a tokenizer and packed token sequences for a causal language model from local text files."""

from __future__ import annotations

import random
import sysconfig
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from datasets import Dataset, disable_progress_bars, enable_progress_bars, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# Test data of the standard library includes files in deliberately broken encodings.
NOT_LIBRARY_SOURCE = {"site-packages", "test", "tests", "idle_test", "idlelib", "lib2to3"}


def find_text_files(text: str | None) -> list[str]:
    """Return the files to train on: `text` itself, all text files in it, or the sources of Python's library."""
    if text is None:
        root = Path(sysconfig.get_path("stdlib"))
        files = [p for p in root.rglob("*.py") if NOT_LIBRARY_SOURCE.isdisjoint(p.relative_to(root).parts)]
    elif Path(text).is_file():
        files = [Path(text)]
    elif Path(text).is_dir():
        files = [p for p in Path(text).rglob("*") if p.is_file() and _is_visible_text(p, Path(text))]
    else:
        raise FileNotFoundError(f"--text_dir {text}: no such file or folder")
    if not files:
        raise ValueError(f"no text files in {text or root}")
    return sorted(str(p) for p in files)


def _is_visible_text(path: Path, root: Path) -> bool:
    if any(part.startswith(".") for part in path.relative_to(root).parts):
        return False
    with path.open("rb") as file:
        head = file.read(4096)
    return bool(head) and b"\0" not in head


def load_documents(files: list[str], cache_dir: Path) -> Dataset:
    """Load one row per file. Everything is read from disk; no hub is contacted."""
    # Its progress bar would say "Downloading" for local files.
    disable_progress_bars()
    documents = load_dataset(
        "text",
        data_files=files,
        split="train",
        sample_by="document",
        encoding_errors="replace",
        cache_dir=str(cache_dir),
    )
    enable_progress_bars()
    return documents


def read_documents(files: list[str], seed: int) -> Iterator[str]:
    """Yield the files' texts in random order, the same on every rank. Files are read only when they are needed."""
    for file in random.Random(seed).sample(files, len(files)):
        yield Path(file).read_text(encoding="utf-8", errors="replace")


def first_characters(documents: Iterable[str], characters: int) -> Iterator[str]:
    """Yield documents until they have that many characters in total."""
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def train_tokenizer(texts: Iterable[str] | Iterable[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE, which can encode any text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT)


def token_lists(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the tokens of each text, including the one that ends it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    return [ids + end for ids in encoded]


def pack_tokens(documents: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Join the tokens of the documents and cut them into rows of `length` tokens, without padding."""

    def pack(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        tokens = list(chain.from_iterable(token_lists(batch["text"], tokenizer)))
        rows = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": rows, "labels": rows}

    # Large batches of documents, because the tokens left over at the end of a batch are dropped.
    return documents.map(pack, batched=True, batch_size=1000, remove_columns=documents.column_names, desc="Tokenizing")


def token_rows(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, rows: int, length: int) -> Tensor:
    """Return the first `rows` sequences of `length` tokens, as int64 [rows, length], in memory.

    Raises:
        ValueError: if the text is shorter.
    """
    tokens: list[int] = []
    for document in documents:
        tokens += token_lists([document], tokenizer)[0]
        if len(tokens) >= rows * length:
            return torch.tensor(tokens[: rows * length]).view(rows, length)
    raise ValueError(f"the text has {len(tokens)} tokens, but {rows} sequences of {length} need {rows * length}")


def split_held_out(rows: Dataset, fraction: float, at_most: int) -> tuple[Dataset, Dataset]:
    """Return the training rows, and the last rows, which are held out. Documents must be in random order."""
    held_out = min(at_most, int(len(rows) * fraction))
    if held_out < 1:
        raise ValueError(f"the text gives {len(rows)} sequences, which is too few to train on and to hold some out")
    first = len(rows) - held_out
    return rows.select(range(first)), rows.select(range(first, len(rows)))
