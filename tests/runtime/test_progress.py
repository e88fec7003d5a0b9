"""Long work shows how far it is: in one line on a terminal, otherwise in the log; short work shows nothing."""

from __future__ import annotations

import io
import logging
import re
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint import stored_state, tensor_files, writer
from shampoo_deepspeed.runtime import progress as module
from shampoo_deepspeed.runtime.progress import mebibytes, progress
from tests.support.stepping import drive, parameter


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """All times, a hundred times shorter."""
    for name in ("QUIET", "ON_A_TERMINAL", "IN_THE_LOG"):
        monkeypatch.setattr(module, name, getattr(module, name) / 100)


def work(seconds: float) -> None:
    with progress("saving", 3 << 20, mebibytes) as advance:
        advance(1 << 20)
        time.sleep(seconds)
        advance(2 << 20)


def test_a_terminal_has_one_line_that_goes_away(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    work(0.1)
    text = terminal.getvalue()
    assert "saving: 33%, 1 MiB of 3 MiB, 0 s" in text
    assert "\n" not in text and text.endswith("\r\x1b[K")


def test_elsewhere_the_log_has_a_line_now_and_then(hurried: None, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="shampoo_deepspeed")
    work(0.5)
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0].startswith("saving: 33%, 1 MiB of 3 MiB")
    assert re.fullmatch(r"saving: 3 MiB in 0\.[5-9] s|saving: 3 MiB in \d+\.\d s", messages[-1])


def test_short_work_shows_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(logging.INFO, logger="shampoo_deepspeed")
    work(0.0)
    assert terminal.getvalue() == "" and not caplog.records
    assert not [thread for thread in threading.enumerate() if thread.name == "shampoo-progress"]


def test_other_ranks_show_nothing(hurried: None, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    work(0.1)
    assert terminal.getvalue() == ""


def test_an_error_in_the_work_is_the_error_that_is_raised(hurried: None) -> None:
    with pytest.raises(ValueError, match="disk full"), progress("saving", 1):
        raise ValueError("disk full")


def test_the_plan_saving_and_loading_are_such_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With a log line for each, though each takes no time here."""
    monkeypatch.setattr(module, "QUIET", -1.0)
    for user in (writer, tensor_files, stored_state):
        monkeypatch.setattr(user, "LARGE", 0)
    caplog.set_level(logging.INFO, logger="shampoo_deepspeed")
    tensors: list[nn.Parameter] = [parameter(8, 6), parameter(6)]
    optimizer = Shampoo(zip("wb", tensors, strict=True))
    drive(optimizer, tensors, range(2))
    save_shampoo(optimizer, tmp_path)
    again: list[nn.Parameter] = [parameter(8, 6), parameter(6)]
    resumed = Shampoo(zip("wb", again, strict=True))
    load_shampoo(resumed, tmp_path)
    drive(resumed, again, range(2, 3))
    text = caplog.text
    assert text.count("planning the first step: 2 tensors in") == 2
    for what in ("saving", "checking the checkpoint", "loading"):
        assert re.search(rf"{what}: \d+ MiB in", text), what
