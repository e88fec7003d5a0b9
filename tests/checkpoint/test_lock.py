"""Two jobs that save into one folder: whoever says "saved" has a complete checkpoint there, or is told who holds it."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint import lock as locks
from shampoo_deepspeed.checkpoint.lock import FolderLock, Holder
from shampoo_deepspeed.checkpoint.manifest import open_checkpoint
from tests.support.stepping import drive, parameter, same_bits, shampoo, state_of

FORK = multiprocessing.get_context("fork")


def made(steps: int = 2) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(8, 6), parameter(6)]
    optimizer = shampoo([("w", params[0]), ("b", params[1])])
    drive(optimizer, params, range(steps))
    return params, optimizer


def hold(folder: Path, sender: Any) -> None:
    held = FolderLock.acquire(folder)
    sender.send(held.is_held())
    time.sleep(600)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that holds the folder's lock."""
    receiver, sender = FORK.Pipe(duplex=False)
    child = FORK.Process(target=hold, args=(tmp_path, sender))
    child.start()
    receiver.recv()
    yield child
    child.kill()
    child.join()


def test_the_error_says_who_holds_the_folder_and_a_dead_holder_holds_nothing(tmp_path: Path, holder: Any) -> None:
    _, optimizer = made()
    for asynchronous in (False, True):
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on host {re.escape(os.uname().nodename)} is"):
            save_shampoo(optimizer, tmp_path, asynchronous=asynchronous).result()
        if asynchronous:
            with pytest.raises(CheckpointError, match="is saving into"):
                load_shampoo(optimizer, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["save.lock"]
    holder.kill()
    holder.join()
    save_shampoo(optimizer, tmp_path)
    assert {file.name.partition("-")[0] for file in tmp_path.iterdir()} == {"data", "manifest.json"}


def save_again_and_again(folder: Path, start: Any, sender: Any) -> None:
    _, optimizer = made(1)
    for _ in range(12):
        start.wait()
        try:
            save_shampoo(optimizer, folder)
            sender.send("saved")
        except CheckpointError as error:
            sender.send(str(error))
        start.wait()


def test_of_two_jobs_at_the_same_moment_one_saves_and_the_other_is_told(tmp_path: Path) -> None:
    start = FORK.Barrier(3)
    pipes = [FORK.Pipe(duplex=False) for _ in range(2)]
    children = [FORK.Process(target=save_again_and_again, args=(tmp_path, start, sender)) for _, sender in pipes]
    for child in children:
        child.start()
    told = 0
    for _ in range(12):
        start.wait()
        answers = [receiver.recv() for receiver, _ in pipes]
        assert "saved" in answers
        told += sum("is saving into" in answer for answer in answers)
        assert all(answer == "saved" or "is saving into" in answer for answer in answers)
        manifest, files = open_checkpoint(tmp_path)
        assert files.verify(0, 1, set(manifest.parameters)) == {}
        assert len(list(tmp_path.iterdir())) == 2
        start.wait()
    for child in children:
        child.join()
    assert told


def test_a_child_of_a_dead_holder_holds_nothing(tmp_path: Path) -> None:
    receiver, sender = FORK.Pipe(duplex=False)
    first = FORK.Process(target=stay_with_a_child, args=(tmp_path, sender))
    first.start()
    grandchild = receiver.recv()
    first.join()
    _, optimizer = made()
    try:
        save_shampoo(optimizer, tmp_path)
    finally:
        os.kill(grandchild, 9)
    load_shampoo(optimizer, tmp_path)


def stay_with_a_child(folder: Path, sender: Any) -> None:
    """Hold the lock, fork a process that inherits the open file, and die."""
    held = FolderLock.acquire(folder)
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
        os._exit(0)
    assert held.is_held()
    sender.send(pid)
    os._exit(0)


def test_a_process_that_was_forked_during_a_save_does_not_keep_the_lock(tmp_path: Path) -> None:
    held = FolderLock.acquire(tmp_path)
    receiver, sender = FORK.Pipe(duplex=False)

    def stay() -> None:
        sender.send(None)
        time.sleep(600)

    child = FORK.Process(target=stay)
    child.start()
    receiver.recv()
    held.release()
    save_shampoo(made()[1], tmp_path)
    child.kill()
    child.join()


HERE = vars(Holder.here())
GONE = {**HERE, "start": "1"}  # another process has this id now
ELSEWHERE = {**HERE, "host": "node17"}
CONTAINER = {**GONE, "space": "another"}  # its ids mean other processes
NO_FLOCK: dict[str, tuple[str, float, bool]] = {
    "this process": (json.dumps(HERE), 0, False),
    "this process, long ago": (json.dumps(HERE), 2 * locks.STALE, False),
    "gone": (json.dumps(GONE), 0, True),
    "another host": (json.dumps(ELSEWHERE), 0, False),
    "another host, long ago": (json.dumps(ELSEWHERE), 2 * locks.STALE, True),
    "another container": (json.dumps(CONTAINER), 0, False),
    "no text": ("", 0, False),
    "no text, long ago": ("", 2 * locks.STALE, True),
    "nonsense": ('{"host": [[', 0, False),
}


@pytest.mark.parametrize("name", NO_FLOCK)
def test_without_flock_the_text_and_the_time_decide(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, age, free = NO_FLOCK[name]

    def unsupported(*_: Any) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    _, optimizer = made()
    file = tmp_path / "save.lock"
    file.write_text(text)
    os.utime(file, (time.time() - age,) * 2)
    if free:
        save_shampoo(optimizer, tmp_path)
        load_shampoo(optimizer, tmp_path)
        return
    with pytest.raises(CheckpointError, match="is saving into"):
        save_shampoo(optimizer, tmp_path)
    assert file.read_text() == text


@pytest.mark.parametrize("text", ["", "nonsense", json.dumps(ELSEWHERE), json.dumps(HERE)])
def test_with_flock_a_text_that_nobody_locks_is_stale(text: str, tmp_path: Path) -> None:
    (tmp_path / "save.lock").write_text(text)
    save_shampoo(made()[1], tmp_path)
    assert not (tmp_path / "save.lock").exists()


@pytest.mark.parametrize(
    "make", [lambda p: p.symlink_to("elsewhere"), os.mkfifo, Path.mkdir], ids=["link", "pipe", "folder"]
)
def test_a_lock_that_is_no_file_is_refused(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "save.lock")
    with pytest.raises(CheckpointError, match="save.lock is no regular file"):
        save_shampoo(made()[1], tmp_path)
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_was_taken_away_ends_the_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, optimizer = made()
    save_shampoo(optimizer, tmp_path)
    before = (tmp_path / "manifest.json").read_bytes()
    joined = locks.FolderLock.check

    def taken(self: FolderLock) -> None:
        self.path.unlink()
        self.path.write_text("of another job")
        joined(self)

    monkeypatch.setattr(locks.FolderLock, "check", taken)
    with pytest.raises(CheckpointError, match="was taken away while this save was under way"):
        save_shampoo(optimizer, tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == before and (tmp_path / "save.lock").exists()


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("place", ["os.pwrite", "os.fsync", "os.replace", "os.ftruncate", "safetensors.safe_open"])
def test_an_interrupt_passes_through_a_save_and_leaves_the_last_one(
    place: str, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = made()
    save_shampoo(optimizer, tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def interrupted(*_: Any, **__: Any) -> None:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr(place, interrupted)
        with pytest.raises(kind):
            save_shampoo(optimizer, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    drive(optimizer, params, range(2, 3))
    save_shampoo(optimizer, tmp_path)
    load_shampoo(optimizer, tmp_path)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("when", ["load", "step"])
def test_an_interrupt_passes_through_a_load(
    when: str, kind: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = made()
    save_shampoo(optimizer, tmp_path)
    own, again = made(0)
    if when == "step":
        load_shampoo(again, tmp_path)

    def interrupted(*_: Any, **__: Any) -> None:
        raise kind

    with monkeypatch.context() as patch:
        patch.setattr("os.preadv", interrupted)
        with pytest.raises(kind):
            load_shampoo(again, tmp_path) if when == "load" else drive(again, own, range(2, 3))
    load_shampoo(again, tmp_path)
    drive(again, own, range(2, 3))
    drive(optimizer, params, range(2, 3))
    assert state_of(again)["steps"] == {"w": 3, "b": 3}


def moments(state: Any) -> Any:
    """The moments of "b", by name."""
    return next(part["tensors"] for part in state["elementwise"] if part["segments"])


def test_state_that_waits_for_a_gradient_does_not_need_the_folder(tmp_path: Path) -> None:
    """The folder is deleted right after the load, and again after each save (accelerate's total_limit = 1)."""
    params, optimizer = made(3)
    save_shampoo(optimizer, tmp_path / "0")
    own, again = made(0)
    load_shampoo(again, tmp_path / "0")
    shutil.rmtree(tmp_path / "0")
    own[1].grad = None
    drive(again, own[:1], range(3, 4))  # "b" has no gradient yet
    for number in range(1, 4):
        save_shampoo(again, tmp_path / str(number), asynchronous=number == 2).result()
        third, other = made(0)
        load_shampoo(other, tmp_path / str(number))
        shutil.rmtree(tmp_path / str(number))
        assert state_of(other)["steps"] == {"w": 4, "b": 3}
    drive(again, own, range(4, 5))
    drive(other, third, range(4, 5))
    ours, theirs = state_of(again), state_of(other)
    assert same_bits(ours["stacks"], theirs["stacks"])
    assert same_bits(moments(ours), moments(theirs)) and ours["steps"] == theirs["steps"] == {"w": 5, "b": 4}


def test_files_are_closed_when_their_state_is_in_use(tmp_path: Path) -> None:
    _, optimizer = made(3)
    save_shampoo(optimizer, tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        own, again = made(0)
        load_shampoo(again, tmp_path)
        assert len(os.listdir("/proc/self/fd")) > before
        drive(again, own, range(3, 4))
        assert len(os.listdir("/proc/self/fd")) == before
