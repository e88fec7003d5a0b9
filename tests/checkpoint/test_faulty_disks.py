"""What the torture of disks and of hostile manifests has found, each as a small case."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.manifest import Manifest, checksum
from tests.support.manifests import body_of, put
from tests.support.stepping import drive, parameter, same_bits, shampoo, state_of


def made(steps: int = 0) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(8, 6), parameter(6)]
    optimizer = shampoo([("w", params[0]), ("b", params[1])])
    drive(optimizer, params, range(steps))
    return params, optimizer


def state_in(path: Path) -> Any:
    params, optimizer = made()
    load_shampoo(optimizer, path)
    drive(optimizer, params, range(9, 10))
    return state_of(optimizer)


@pytest.mark.parametrize("call", ["pwrite", "write"], ids=["data", "manifest"])
def test_a_file_system_that_takes_no_bytes_ends_the_save(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = made(2)
    save_shampoo(optimizer, tmp_path)
    before = state_in(tmp_path)
    drive(optimizer, params, range(2, 3))
    calls = []

    def nothing(*_: Any) -> int:
        calls.append(call)
        assert len(calls) < 100, "it tries forever"
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(os, call, nothing)
        with pytest.raises(CheckpointError, match="nothing could be written: "):
            save_shampoo(optimizer, tmp_path)
    assert same_bits(state_in(tmp_path), before)
    save_shampoo(optimizer, tmp_path)


def removes(source: Path, target: Path) -> None:
    target.unlink()


def writes_half(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes()[:100])


def renames(source: Path, target: Path) -> None:
    source.rename(target)


@pytest.mark.parametrize("how", [removes, writes_half, renames])
def test_a_rename_that_is_not_atomic_and_fails_loses_no_save(
    how: Callable[[Path, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = made(2)
    save_shampoo(optimizer, tmp_path)
    before = state_in(tmp_path)
    drive(optimizer, params, range(2, 3))
    save_shampoo(optimizer, tmp_path.parent / "new")

    def fails(source: Path, target: Path) -> None:
        how(source, target)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_shampoo(optimizer, tmp_path)
    expected = state_in(tmp_path.parent / "new") if how is renames else before
    assert same_bits(state_in(tmp_path), expected)


@pytest.mark.parametrize("call", ["fstat", "stat", "open", "preadv"])
def test_each_fault_of_a_load_names_the_checkpoint(call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_shampoo(made(2)[1], tmp_path)
    _, optimizer = made()

    def fails(*_: Any, **__: Any) -> None:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fails)
        with pytest.raises(CheckpointError, match=f"{tmp_path}.* cannot be read: .*Stale file handle"):
            load_shampoo(optimizer, tmp_path)
    load_shampoo(optimizer, tmp_path)


def test_a_link_that_leads_in_a_circle_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    for path in (tmp_path / "a", tmp_path / "a" / "saved"):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            load_shampoo(made()[1], path)
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            save_shampoo(made(1)[1], path)


@pytest.mark.parametrize(
    ("option", "value"),
    [("lr", -2), ("lr", -1e299), ("lr", 1e299), ("momentum", 7), ("betas", [2, 3]), ("eps", "x"), ("rules", [{}])],
)
def test_an_option_that_cannot_be_is_refused_by_name(option: str, value: Any, tmp_path: Path) -> None:
    save_shampoo(made(2)[1], tmp_path)
    body = body_of(tmp_path)
    body["groups"]["0"][option] = value
    put(tmp_path, body)
    params, optimizer = made()
    with pytest.raises(CheckpointError, match=option):
        load_shampoo(optimizer, tmp_path)
    report = load_shampoo(optimizer, tmp_path, strict=False)
    assert set(report.left_out) == {"w", "b"}
    drive(optimizer, params, range(1))


@pytest.mark.parametrize("status", [[4, 0], [-1, 0], [0, -1], [0, 2**31], [2**62, 0], [1, 2**62]], ids=str)
def test_a_status_that_no_block_can_have_is_refused_by_name(status: list[int], tmp_path: Path) -> None:
    save_shampoo(made(2)[1], tmp_path)
    (file,) = tmp_path.glob("data-*/*.safetensors")
    found, body = Manifest.read(tmp_path), body_of(tmp_path)
    ((stored, n),) = [
        (s, n) for s in found.open_files(tmp_path)._of_rank[0] for n, part in enumerate(s.form) if part[0] == "status"
    ]
    new = torch.tensor(status).numpy().tobytes()
    content, start = file.read_bytes(), stored.starts[n]
    file.write_bytes(content[:start] + new + content[start + len(new) :])
    row = body["parameters"]["w"]["blocks"][0]
    row[1] = row[1][: 8 * n] + checksum(new) + row[1][8 * (n + 1) :]
    put(tmp_path, body)
    with pytest.raises(CheckpointError, match="blocks/w/0/status is "):
        load_shampoo(made()[1], tmp_path)
