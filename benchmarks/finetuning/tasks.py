"""The tasks as rows of tokens, with what the model knew before: made once and cached."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.finetuning import sources

IGNORED = -100  # a label that counts for nothing, as Transformers has it
LENGTHS = {"dictionary": 32, "handbook": 128}  # tokens of a row
HELD_OUT_ROWS = {"dictionary": 128, "handbook": 32}
HELD_OUT = 10  # one page, or translation, in so many is never trained on
TRAIN_ROWS = 20_000  # of the dictionary at most
GENERAL_LENGTH, GENERAL_ROWS = 128, 24
ATTENTION = "eager"  # on one core at 128 tokens, twice as fast backward as torch's fused one
KNOWN = 32  # most probable tokens of which the predictions before are kept, at each position


@dataclass(frozen=True)
class Task:
    """Token ids and labels, int64 [rows, length] each."""

    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of a step, in the seed's order; the rows come again when all were used."""
        ids, labels = self.train
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
        rows = order[torch.arange(step * size, (step + 1) * size) % len(ids)]
        return ids[rows], labels[rows]


@dataclass(frozen=True)
class Known:
    """General text, and what the model predicted there before: its most probable tokens, and the loss."""

    rows: Tensor  # int64 [rows, length]
    tokens: Tensor  # int64 [rows, length - 1, KNOWN]
    log_probabilities: Tensor  # float32, likewise


@dataclass(frozen=True)
class Tasks:
    """All tasks, the general text, figures of the model as it was, and a digest of all that determines them."""

    tasks: dict[str, Task]
    known: Known
    start: dict[str, dict[str, float]]
    digest: str


def is_held_out(key: str) -> bool:
    """By the text of the key alone, so that more rows move none from one side to the other."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HELD_OUT == 0


def answered(tokenizer: Any, pairs: Iterable[tuple[str, str]], length: int, rows: int) -> tuple[Tensor, Tensor]:
    """Up to `rows` questions with answers; only the answers have labels. What is too long for a row is left out."""
    ids, labels = [], []
    for english, german in pairs:
        question = tokenizer(f"English: {english}\nGerman:")["input_ids"]
        answer = [*tokenizer(f" {german}")["input_ids"], tokenizer.eos_token_id]
        lacking = length - len(question) - len(answer)
        if lacking >= 0:
            ids.append(question + answer + [tokenizer.eos_token_id] * lacking)
            labels.append([IGNORED] * len(question) + answer + [IGNORED] * lacking)
        if len(ids) == rows:
            break
    return torch.tensor(ids), torch.tensor(labels)


def packed(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Texts one after another, each with an end, cut into rows; every token but a row's first is a target."""
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    rows = torch.tensor(stream[: len(stream) // length * length]).view(-1, length)
    return rows, rows


def evenly(rows: tuple[Tensor, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Rows at even distances."""
    picked = torch.linspace(0, len(rows[0]) - 1, min(count, len(rows[0]))).long()
    return rows[0][picked], rows[1][picked]


def dictionary(tokenizer: Any, pairs: list[tuple[str, str]]) -> Task:
    """Translations; all pairs of one translation are on the same side."""
    random.Random(0).shuffle(pairs)
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for pair in pairs:
        sides[is_held_out(pair[1])].append(pair)
    length, rows = LENGTHS["dictionary"], HELD_OUT_ROWS["dictionary"]
    return Task(answered(tokenizer, sides[0], length, TRAIN_ROWS), answered(tokenizer, sides[1], length, rows))


def handbook(tokenizer: Any, pages: list[tuple[str, str]]) -> Task:
    """Pages of text, whole ones held out."""
    length = LENGTHS["handbook"]
    train = packed(tokenizer, [text for name, text in pages if not is_held_out(name)], length)
    held_out = packed(tokenizer, [text for name, text in pages if is_held_out(name)], length)
    return Task(train, evenly(held_out, HELD_OUT_ROWS["handbook"]))


def make_tasks(root: Path, model_folder: Path, cache: Path) -> Path:
    """The file of all tasks, made if the cache lacks it."""
    from benchmarks.finetuning import evaluation  # which imports this file
    from examples.pretrained import SHA256

    pairs, pages, prose = sources.translations(root), sources.pages(root), sources.lexicon(root)
    constants = [LENGTHS, HELD_OUT_ROWS, HELD_OUT, TRAIN_ROWS, GENERAL_LENGTH, GENERAL_ROWS, KNOWN, SHA256]
    digest = hashlib.sha256(repr([pairs, pages, prose, constants]).encode()).hexdigest()[:12]
    file = cache / f"tasks_{digest}.pt"
    if file.exists():
        return file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, attn_implementation=ATTENTION).eval()
    tasks = {"dictionary": dictionary(tokenizer, pairs), "handbook": handbook(tokenizer, pages)}
    general = evenly(packed(tokenizer, [prose], GENERAL_LENGTH), GENERAL_ROWS)[0]
    known = evaluation.predictions(model, general)
    start = {name: evaluation.figures(model, task, known) for name, task in tasks.items()}
    stored = {
        "tasks": {name: [*task.train, *task.held_out] for name, task in tasks.items()},
        "known": [known.rows, known.tokens, known.log_probabilities],
        "start": start,
        "digest": digest,
    }
    cache.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(".part")
    torch.save(stored, aside)
    aside.rename(file)
    return file


def load_tasks(file: Path) -> Tasks:
    stored = torch.load(file, weights_only=True)
    tasks = {name: Task((t[0], t[1]), (t[2], t[3])) for name, t in stored["tasks"].items()}
    return Tasks(tasks, Known(*stored["known"]), stored["start"], stored["digest"])
