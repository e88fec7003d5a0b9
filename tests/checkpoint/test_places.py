"""Saves and loads with several optimizers, other directories, other experts and full disks."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo, wait_for_saves
from shampoo_deepspeed.checkpoint.inspect import describe
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.distributed.frameworks import Layout, plain_layouts
from tests.support.stepping import drive, parameter, same_bits, shampoo, state_of

ROOT = Path(__file__).parents[2]


def trained(steps: int = 3, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(8, 6), parameter(6)]
    optimizer = shampoo([("w", params[0]), ("b", params[1])], **options)
    drive(optimizer, params, range(steps))
    return params, optimizer


def test_a_failed_asynchronous_save_raises_only_for_its_own_optimizer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (_, failing), (_, other) = trained(), trained()
    (tmp_path / "file").write_text("no folder")
    bad = tmp_path / "file" / "below"
    save_shampoo(failing, bad, asynchronous=True)
    save_shampoo(other, tmp_path / "good")
    load_shampoo(other, tmp_path / "good")
    assert f"the asynchronous save into {bad} has failed" in caplog.text
    with pytest.raises(CheckpointError, match=f"{bad} cannot be written"):
        save_shampoo(failing, tmp_path / "another")
    save_shampoo(failing, tmp_path / "another")


def test_saves_of_two_optimizers_into_one_folder_come_one_after_the_other(tmp_path: Path) -> None:
    (params, first), (_, second) = trained(3), trained(5)
    for _ in range(3):
        future = save_shampoo(first, tmp_path, asynchronous=True)
        save_shampoo(second, tmp_path)
        assert future.done() and Manifest.read(tmp_path).parameters["w"]["steps"] == 5
    load_shampoo(first, tmp_path)
    drive(first, params, range(5, 6))


def test_a_relative_path_is_that_of_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory may have changed when a thread writes, or when the first step reads."""
    (tmp_path / "another").mkdir()
    params, optimizer = trained()
    monkeypatch.chdir(tmp_path)
    future = save_shampoo(optimizer, "saved", asynchronous=True)
    os.chdir(tmp_path / "another")
    future.result()
    assert (tmp_path / "saved/manifest.json").is_file()
    os.chdir(tmp_path)
    own, again = trained(0)
    load_shampoo(again, "saved")
    os.chdir(tmp_path / "another")
    drive(again, own, range(3, 4))
    drive(optimizer, params, range(3, 4))
    assert same_bits(state_of(optimizer), state_of(again))


def test_a_link_is_followed_when_it_is_given(tmp_path: Path) -> None:
    params, optimizer = trained()
    save_shampoo(optimizer, tmp_path / "3")
    drive(optimizer, params, range(3, 5))
    save_shampoo(optimizer, tmp_path / "5")
    latest = tmp_path / "latest"
    latest.symlink_to("3")
    own, again = trained(0)
    load_shampoo(again, latest)
    latest.unlink()
    latest.symlink_to("5")
    drive(again, own, range(3, 4))
    assert state_of(again)["steps"] == {"w": 4, "b": 4}


def as_experts(monkeypatch: pytest.MonkeyPatch, part: int | None, parts: int) -> None:
    """From now on, treat parameters as those of one of several expert-parallel ranks."""

    def layouts(*arguments: Any) -> list[Layout]:
        found = plain_layouts(*arguments)
        for layout in found:
            layout.part, layout.parts = part, parts
        return found

    monkeypatch.setattr("shampoo_deepspeed.engine.parameter_registry.plain_layouts", layouts)


def test_experts_do_not_take_the_state_of_others_with_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With half as many expert-parallel ranks, the second rank's first expert is another one."""
    as_experts(monkeypatch, 1, 4)
    _, optimizer = trained()
    save_shampoo(optimizer, tmp_path)
    wrong = {(1, 2): "saved with 4 expert-parallel ranks, but here are 2: 'w@1'", (None, 1): "'w' is not in it"}
    for (part, parts), message in wrong.items():
        as_experts(monkeypatch, part, parts)
        own, again = trained(0)
        load_shampoo(again, tmp_path, strict=False)
        with pytest.raises(ValueError, match=message):
            drive(again, own, range(3, 4))
    as_experts(monkeypatch, 1, 4)
    own, again = trained(0)
    load_shampoo(again, tmp_path)
    drive(again, own, range(3, 4))
    assert state_of(again)["steps"] == {"w": 4, "b": 4}


def test_no_expert_of_an_earlier_save_stays_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in (3, 1):
        as_experts(monkeypatch, part, 4)
        _, optimizer = trained()
        save_shampoo(optimizer, tmp_path)
    assert set(Manifest.read(tmp_path).parameters) == {"w@1", "b@1"}
    (data,) = tmp_path.glob("data-*")
    assert {file.name for file in data.iterdir()} == {"rank-0.safetensors"}


@pytest.mark.parametrize("error", [ValueError, KeyError, AssertionError])
def test_a_save_that_cannot_be_prepared_fails_as_any_other(
    error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds for any error, because other ranks wait for this one's answer."""

    def wrong(*_: Any) -> None:
        raise error("the state is not as it should be")

    _, optimizer = trained()
    monkeypatch.setattr("shampoo_deepspeed.checkpoint.save.share_of", wrong)
    with pytest.raises(CheckpointError, match=f"{tmp_path} cannot be written.*not as it should be"):
        save_shampoo(optimizer, tmp_path)


@pytest.mark.parametrize("number", [5, 13])
def test_a_folder_that_fails_while_a_failure_is_cleared_away_is_no_other_failure(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If it is unknown which save is in place, both stay."""

    def broken(*_: Any) -> None:
        raise OSError(number, "no answer")

    def refused(*_: Any) -> None:
        raise RuntimeError("it was refused")

    _, optimizer = trained()
    save_shampoo(optimizer, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr("shampoo_deepspeed.checkpoint.save.Path.exists", broken)
        patched.setattr("shampoo_deepspeed.checkpoint.save._joined", refused)
        with pytest.raises(CheckpointError, match="it was refused"):
            save_shampoo(optimizer, tmp_path)
    assert len(list(tmp_path.glob("data-*"))) == 2
    save_shampoo(optimizer, tmp_path)
    assert len(list(tmp_path.glob("data-*"))) == 1


def test_a_folder_that_cannot_be_listed_is_no_failure_of_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    _, optimizer = trained()
    monkeypatch.setattr("shampoo_deepspeed.checkpoint.save.Path.iterdir", broken)
    save_shampoo(optimizer, tmp_path)
    assert (tmp_path / "manifest.json").is_file() and "could not be removed: [Errno 5]" in caplog.text


def test_a_full_disk_leaves_the_last_save_and_nothing_else(tmp_path: Path) -> None:
    """The operating system itself refuses to write."""
    params, optimizer = trained()
    save_shampoo(optimizer, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    data = max(file.stat().st_size for file in before if file.is_file())
    drive(optimizer, params, range(3, 4))
    signal_before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (data // 2, limits[1]))
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            save_shampoo(optimizer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, signal_before)
    assert sorted(tmp_path.rglob("*")) == before
    load_shampoo(optimizer, tmp_path)
    drive(optimizer, params, range(3, 4))
    assert state_of(optimizer)["steps"] == {"w": 4, "b": 4}


@pytest.mark.parametrize("place", ["os.replace", "os.fsync"])
def test_a_manifest_that_cannot_be_written_is_not_left_half(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, optimizer = trained()
    save_shampoo(optimizer, tmp_path)
    before = sorted(tmp_path.rglob("*"))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(f"shampoo_deepspeed.checkpoint.writer.{place}", full)
        with pytest.raises(CheckpointError, match="No space left"):
            save_shampoo(optimizer, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_save_that_is_complete_but_not_yet_durable_keeps_its_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename has happened; only the fsync that makes it survive a loss of power has failed."""
    params, optimizer = trained()
    calls = []

    def second_fails(path: Path) -> None:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(5, "Input/output error")

    for module in ("checkpoint.writer", "checkpoint.save"):
        monkeypatch.setattr(f"shampoo_deepspeed.{module}.sync_directory", second_fails)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save_shampoo(optimizer, tmp_path)
    load_shampoo(optimizer, tmp_path)
    drive(optimizer, params, range(3, 4))
    assert state_of(optimizer)["steps"] == {"w": 4, "b": 4}


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match="path is empty"):
        save_shampoo(trained(0)[1], "")


def test_zero_sized_parameters_and_strange_names(tmp_path: Path) -> None:
    names = ["a/b", "a/b/0", "w@", "w@1", "@", "w", "new\nline", "..", "x/"]
    shapes = [(8, 6), (0, 4), (0,), (6,), (), (8, 6), (6,), (8, 6), (6,)]
    params = [nn.Parameter(torch.ones(shape) * n) for n, shape in enumerate(shapes)]
    optimizer = shampoo(list(zip(names, params, strict=True)), momentum=0.9)
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, tmp_path)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    again = shampoo(list(zip(names, own, strict=True)), momentum=0.9)
    assert set(load_shampoo(again, tmp_path).loaded) == set(names)
    for with_, given in ((optimizer, params), (again, own)):
        drive(with_, given, range(4, 8))
    assert same_bits([p.detach() for p in params], [p.detach() for p in own])


def test_waiting_for_all_saves_raises_the_first_failure_once(tmp_path: Path) -> None:
    (_, first), (_, second), (_, good) = trained(), trained(), trained()
    (tmp_path / "file").write_text("no folder")
    bad = [tmp_path / "file" / name for name in "ab"]
    for optimizer, path in zip((first, second, good), [*bad, tmp_path / "good"], strict=True):
        save_shampoo(optimizer, path, asynchronous=True)
    with pytest.raises(CheckpointError, match=f"{bad[0]} cannot be written"):
        wait_for_saves()
    assert (tmp_path / "good/manifest.json").is_file()
    wait_for_saves()
    save_shampoo(first, tmp_path / "again")


def test_waiting_for_all_saves_raises_a_failure_after_another_optimizer_s_save(tmp_path: Path) -> None:
    (_, failing), (_, other) = trained(), trained()
    (tmp_path / "file").write_text("no folder")
    bad = tmp_path / "file" / "below"
    save_shampoo(failing, bad, asynchronous=True)
    save_shampoo(other, tmp_path / "good")
    with pytest.raises(CheckpointError, match=f"{bad} cannot be written"):
        wait_for_saves()


AT_EXIT = """
import atexit, sys, weakref
from pathlib import Path
folder = Path(sys.argv[1])
atexit.register(lambda: print("saved:", (folder / "saved/manifest.json").is_file()))  # runs last
import torch.distributed as dist
from shampoo_deepspeed.distributed import process_groups
from shampoo_deepspeed import save_shampoo
from tests.support.stepping import drive, parameter, shampoo
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
params = [parameter(8, 6)]
optimizer = shampoo([("w", params[0])], process_group=dist.group.WORLD)
drive(optimizer, params, range(1))
save_shampoo(optimizer, folder / "saved", asynchronous=True)
print(sum(isinstance(job.thread_group, weakref.ref) for job in process_groups._jobs.values()), "made")
"""


@pytest.mark.slow
def test_the_interpreter_s_exit_waits_for_a_save_and_nothing_of_ours_holds_its_process_group(tmp_path: Path) -> None:
    command = [sys.executable, "-c", AT_EXIT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "1 made\nsaved: True\n", done.stdout + done.stderr


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"], ids=ascii)
@pytest.mark.parametrize("use", [save_shampoo, load_shampoo, lambda _, path: describe(Path(path))])
def test_a_path_that_no_folder_can_have_is_refused(use: Callable[[Shampoo, str], Any], path: str) -> None:
    _, optimizer = trained()
    with pytest.raises(CheckpointError, match=r"a\\(x00|ud800)b.* cannot be (read|written)"):
        use(optimizer, path)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("shape", [(8, 6), (6,)], ids=str)
@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("name", ["a\ud800", "n" * 70_000], ids=["surrogate", "long"])
def test_a_name_that_no_manifest_can_hold_is_named(
    name: str, stepped: bool, shape: tuple[int, ...], asynchronous: bool, tmp_path: Path
) -> None:
    w = parameter(*shape)
    optimizer = shampoo([(name, w)])
    drive(optimizer, [w], range(int(stepped)))
    with pytest.raises(CheckpointError, match=r"the name of a parameter is '(a\\ud800|nn+\.\.\.n+)'"):
        save_shampoo(optimizer, tmp_path, asynchronous=asynchronous).result()
    assert not list(tmp_path.iterdir())
