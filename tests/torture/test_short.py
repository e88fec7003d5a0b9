"""Short forms of the torture's parts that need one process, and what the torture counts and writes."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from shampoo_deepspeed import CheckpointError
from shampoo_deepspeed.options.config import OPTION_NAMES
from tests.torture import __main__ as torture
from tests.torture import damage, disk, hostile, options, soak
from tests.torture.figures import KINDS, Figures, read
from tests.torture.small_runs import ending


@pytest.mark.slow
def test_damage_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    saves, figures = damage.by_one_process(tmp_path / "saves"), Figures()
    every = [*damage.damages_of_names(saves), *damage.damages_of_bytes(saves, 1, 0)]
    damage.torture(damage.Trial(saves, tmp_path / "work"), every, figures, 0, every=41)
    assert not figures.faults
    assert figures.tried > 60 and figures.seen["equal"] > 5 and figures.seen["error"] > 5


@pytest.mark.slow
def test_a_failing_disk_loses_no_save(tmp_path: Path) -> None:
    trial, figures = disk.Trial(tmp_path), Figures()
    kinds = set(trial.calls(True, False))
    assert kinds >= {
        "open to write",
        "write",
        "fsync",
        "rename",
        "mkdir",
        "flock",
        "truncate",
        "unlink",
        "rmdir",
        "stat",
    }
    disk.saves(trial, figures, 83)
    disk.loads(trial, figures, 53)
    disk.by_bytes(trial, figures, 40)
    disk.under_signals(trial, figures, 2)
    disk.with_other_clocks(trial, figures)
    assert not figures.faults
    assert {"saved and the new save", "error and the old save", "error and nothing"} <= set(figures.seen)


@pytest.mark.slow
def test_hostile_manifests_and_data_are_refused_in_little_time_and_memory() -> None:
    figures = Figures()
    hostile.torture(50, 0, figures, derandomize=True)
    assert not figures.faults
    assert figures.seen["refused"] > 20


@pytest.mark.slow
def test_a_run_in_which_everything_is_switched_holds_no_more_threads_and_files(tmp_path: Path) -> None:
    found = soak.faults(soak.soak(2 * soak.ROUND, tmp_path))
    assert not [fault for fault in found if "memory" not in fault]  # which so short a run cannot tell


def test_every_option_is_tried() -> None:
    assert options.USUAL.keys() <= set(OPTION_NAMES)
    assert set(OPTION_NAMES) - options.USUAL.keys() <= {"process_group", "model"}


class Raw(CheckpointError):
    """Prints what `CheckpointError` itself would escape."""

    def __str__(self) -> str:
        return "file \x1b"


def test_what_is_no_promised_end_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(error: BaseException) -> Any:
        raise error

    assert ending(lambda: 1, [1], ["file"])[0] == "equal"
    assert ending(lambda: 2, [1], ["file"])[0] == "silent"
    assert ending(lambda: raises(ValueError("file")), [1], ["file"])[0] == "bare"
    assert ending(lambda: raises(SystemExit(1)), [1], ["file"])[0] == "bare"
    assert ending(lambda: raises(CheckpointError("file")), [1], ["file"])[0] == "error"
    assert ending(lambda: raises(CheckpointError("what?")), [1], ["file"])[0] == "others"
    assert ending(lambda: raises(Raw("file")), [1], ["file"])[0] == "others"
    monkeypatch.setattr("tests.torture.small_runs.SECONDS", 0.05)
    assert ending(lambda: time.sleep(60), [1], ["file"])[0] == "hangs"


def test_the_table_counts_each_kind_of_fault(capsys: pytest.CaptureFixture[str]) -> None:
    figures = Figures(7)
    assert figures.told() == 0
    figures.fault("losses", "one")
    assert figures.told() == 1
    none = dict.fromkeys(KINDS, 0)
    text = capsys.readouterr().out
    assert read(text) == torture.figures(text, 1, None) == {"tried": 7, **none, "losses": 1}
    assert torture.figures("", 0, 9) == {"tried": 9, **none}
    assert torture.figures("", 0, None) == {"tried": 0, **none, "bare": 1}  # ended before it had tried all
    assert torture.figures("", None, 9) == {"tried": 9, **none, "hangs": 1}
    assert torture.figures("AssertionError: w is not finite", 1, 9)["silent"] == 1
    assert torture.figures("ValueError: x", 1, 9)["bare"] == 1
    assert torture.figures(f"figures: {json.dumps({'tried': 1, **none})}", 1, None)["bare"] == 1


def test_the_table_replaces_that_of_the_last_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    text = torture.PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    for number in range(2):
        torture.put_into_the_page([["kills", "all", str(number), *["0"] * 6]], 1.0, page)
    new = page.read_text(encoding="utf-8")
    assert "| kills | all | 1 | 0 |" in new and "| kills | all | 0 |" not in new
    assert new.partition(torture.BEGIN)[0] == text.partition(torture.BEGIN)[0]
    assert new.partition(torture.END)[2] == text.partition(torture.END)[2]


@pytest.mark.parametrize("name", torture.PARTS)
def test_every_part_has_a_command(name: str) -> None:
    for scale in (1.0, 0.001):
        assert torture.PARTS[name].arguments(scale)
    file = Path(torture.__file__).with_name(f"{name}.py")
    text = file.read_text(encoding="utf-8")
    assert 'if __name__ == "__main__":' in text and ("argparse" in text or "count_from_command_line(" in text)
