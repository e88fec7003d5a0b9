"""Asynchronous saves of several ranks are complete after waiting for them; without that, an error says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks.asynchronous_saves import WAIT
from tests.support.launch import Check, run_checks


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """Run the check in its own launch, because it ends the process group; return the folder and the ranks' results."""
    folder = tmp_path_factory.mktemp("jobs")
    check = Check("jobs", 2, "asynchronous_saves:jobs", folder)
    result = run_checks([check], tmp_path_factory.mktemp("launches"))["jobs"]
    assert result.failure is None, result.failure
    return folder, result.values


def test_a_save_is_complete_once_it_was_waited_for(jobs: tuple[Path, list[Any]]) -> None:
    for rank in jobs[1]:
        assert rank["complete"] == [True, True]


def test_a_new_process_group_in_the_same_process_goes_on(jobs: tuple[Path, list[Any]]) -> None:
    for rank in jobs[1]:
        assert rank["same"] and rank["groups"] == 1


def test_groups_of_our_own_wait_as_long_as_those_of_the_job(jobs: tuple[Path, list[Any]]) -> None:
    for rank in jobs[1]:
        assert set(rank["timeouts"]) == {WAIT}


def test_a_save_whose_process_group_was_destroyed_says_what_to_do(jobs: tuple[Path, list[Any]]) -> None:
    folder, ranks = jobs
    assert not (folder / "third/manifest.json").exists()
    for rank in ranks:
        assert str(folder / "third") in rank["raised"] and "wait_for_saves()" in rank["raised"]
        assert any(str(folder / "third") in line and "wait_for_saves()" in line for line in rank["log"])


def test_groups_of_our_own_end_with_their_job(jobs: tuple[Path, list[Any]]) -> None:
    """They have threads, and a later job that used them would be told that they are not registered."""
    for rank in jobs[1]:
        assert rank["left"] == 0
