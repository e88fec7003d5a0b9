"""Makes a small task for fine-tuning from Python's own library: write the summary of a function, given its signature.

Everything is on the disk of each machine with Python. Modules are held out as wholes. The library's language reference
(`pydoc_data`) is prose that a language model has seen; loss on it shows what fine-tuning forgets.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from text_data import find_text_files

IGNORED = -100  # the label of tokens that do not count
LONGEST = 100  # characters of a summary
HELD_OUT = 8  # one module in so many
Row = dict[str, Tensor]


def summaries(source: str) -> Iterator[tuple[str, str]]:
    """Yield signature and first docstring line of each function of a module that has a summary of one sentence."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].strip()
        if summary.endswith(".") and "\n" not in summary and len(summary) <= LONGEST:
            yield f"def {node.name}({ast.unparse(node.args)}):", summary


def is_held_out(module: Path) -> bool:
    """By the module's name alone."""
    return int.from_bytes(hashlib.sha256(module.name.encode()).digest()[:4], "big") % HELD_OUT == 0


def library_pairs() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return all pairs of Python's library: those to train on, and those of modules that are held out."""
    sides: tuple[list[tuple[str, str]], list[tuple[str, str]]] = ([], [])
    for file in map(Path, find_text_files(None)):
        try:
            found = list(summaries(file.read_text(encoding="utf-8", errors="replace")))
        except (SyntaxError, ValueError):  # a template, or code of another version
            continue
        sides[is_held_out(file)].extend(found)
    return sides


def task_row(tokenizer: PreTrainedTokenizerBase, pair: tuple[str, str], length: int) -> Row | None:
    """Return a row of `length` tokens in which only the summary counts, or None if it is longer."""
    question = tokenizer(f'{pair[0]}\n    """')["input_ids"]
    answer = tokenizer(pair[1])["input_ids"] + [tokenizer.eos_token_id]
    lacking = length - len(question) - len(answer)
    if lacking < 0:
        return None
    ids = question + answer + [tokenizer.eos_token_id] * lacking
    labels = [IGNORED] * len(question) + answer + [IGNORED] * lacking
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def task_rows(tokenizer: PreTrainedTokenizerBase, length: int, held_out: int) -> tuple[list[Row], list[Row]]:
    """Return rows to train on, and at most `held_out` rows of other modules, spread over them."""
    sides = [[row for pair in side if (row := task_row(tokenizer, pair, length))] for side in library_pairs()]
    return sides[0], sides[1][:: max(1, len(sides[1]) // held_out)][:held_out]


def general_rows(tokenizer: PreTrainedTokenizerBase, length: int, rows: int) -> list[Row]:
    """Return rows of the language reference, from all of its parts."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        ids = tokenizer(topics[name])["input_ids"][:length]
        if len(ids) == length:
            found.append({"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)})
    return found[:: max(1, len(found) // rows)][:rows]
