"""Tokens of a corpus: a BPE tokenizer trained on it, some documents held out, all of it made once and cached."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 2048
HELD_OUT = 20  # one document in so many is never trained on, the tokenizer's training included
LEFT_OUT = {"translations"}  # of the kernel's documentation: most are not in English
DOCUMENTATION = "linux-doc-*/html/_sources"


@dataclass(frozen=True)
class Corpus:
    """Token streams, and a digest of the text and of how it was tokenized."""

    train: Tensor
    held_out: Tensor
    digest: str

    def rows(self, seed: int, length: int) -> Tensor:
        """All training rows of `length` tokens, in the seed's order."""
        rows = self.train[: len(self.train) // length * length].view(-1, length)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]

    def held_out_rows(self, count: int, length: int) -> Tensor:
        """Rows at even distances over all held-out documents, the same for every run."""
        rows = self.held_out[: len(self.held_out) // length * length].view(-1, length)
        return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def default_text() -> str | None:
    """The installed documentation of the kernel, or None for the sources of Python's library."""
    return next((str(p) for p in sorted(Path("/usr/share/doc").glob(DOCUMENTATION), reverse=True)), None)


def documents(text: str | None) -> list[tuple[str, str]]:
    """Path within the corpus and content of every document, in an order that no path decides."""
    from examples.text_data import find_text_files  # imports datasets, which workers do without

    files = [Path(f) for f in find_text_files(text)]
    root = Path(text) if text and Path(text).is_dir() else files[0].parent
    pairs = []
    for file in files:
        name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
        if LEFT_OUT.isdisjoint(Path(name).parts):
            pairs.append((name, file.read_text(encoding="utf-8", errors="replace")))
    random.Random(0).shuffle(pairs)
    return pairs


def is_held_out(name: str) -> bool:
    """By the document's path alone, so that more documents move none from one side to the other."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % HELD_OUT == 0


def load_corpus(file: Path) -> Corpus:
    stored = torch.load(file, weights_only=True)
    return Corpus(stored["train"].int(), stored["held_out"].int(), stored["digest"])


def make_corpus(text: str | None, folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """The file with the tokens of a text, made if the folder lacks it."""
    pairs = documents(text)
    sum_of_all = hashlib.sha256(str(vocabulary).encode())
    for name, content in pairs:
        sum_of_all.update(hashlib.sha256(f"{name}\0{content}".encode(errors="replace")).digest())
    digest = sum_of_all.hexdigest()[:12]
    file = folder / f"tokens_{digest}.pt"
    if file.exists():
        return file
    from examples.text_data import END_OF_TEXT, train_tokenizer

    kept = [content for name, content in pairs if not is_held_out(name)]
    tokenizer = train_tokenizer(kept, vocabulary).backend_tokenizer
    end = tokenizer.token_to_id(END_OF_TEXT)

    def stream(contents: list[str]) -> Tensor:
        encoded = tokenizer.encode_batch_fast(contents)
        return torch.cat([torch.tensor([*e.ids, end], dtype=torch.int16) for e in encoded])

    held = [content for name, content in pairs if is_held_out(name)]
    folder.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    torch.save({"train": stream(kept), "held_out": stream(held), "digest": digest}, aside)
    aside.rename(file)
    return file
