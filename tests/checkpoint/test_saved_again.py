"""Saves of optimizers with state that is still to be read from an earlier checkpoint, and what saves must keep."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.state.state_dict import BufferState, SavedState
from tests.support.stepping import drive, parameter, same_bits, shampoo, state_of


def two(seed: int = 0) -> list[nn.Parameter]:
    """Return two parameters with one block of the same shape each."""
    return [parameter(8, 6, seed=seed), parameter(8, 6, seed=seed + 1)]


def optimizer_of(params: list[nn.Parameter], **options: Any) -> Shampoo:
    """Return an optimizer of these parameters, which are named "a", "b", ..."""
    return shampoo(list(zip("abc", params, strict=False)), **options)


def half_resumed(path: Path, first: list[nn.Parameter], **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    """Resume with copies of these parameters; only the first one has had a gradient since."""
    params = [nn.Parameter(p.detach().clone()) for p in first]
    optimizer = optimizer_of(params, **options)
    load_shampoo(optimizer, path)
    drive(optimizer, params[:1], range(4, 5))
    for p in params:
        p.grad = None
    return params, optimizer


def goes_on(optimizer: Shampoo, params: list[nn.Parameter], path: Path) -> bool:
    """Whether the optimizer's checkpoint takes all parameters to the same values as the optimizer itself."""
    again = [nn.Parameter(p.detach().clone()) for p in params]
    other = optimizer_of(again)
    load_shampoo(other, path)
    for with_, own in ((optimizer, params), (other, again)):
        drive(with_, own, range(5, 8))
    return same_bits([p.detach() for p in params], [p.detach() for p in again])


def test_a_checkpoint_that_is_used_up_may_go(tmp_path: Path) -> None:
    params = two()
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, tmp_path / "old")
    again = optimizer_of(params)
    load_shampoo(again, tmp_path / "old")
    drive(again, params, range(4, 5))
    shutil.rmtree(tmp_path / "old")
    save_shampoo(again, tmp_path / "new")
    assert again.state_dict()["shampoo"]["steps"] == {"a": 5, "b": 5}
    assert goes_on(again, params, tmp_path / "new")


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("into", ["old", "new"])
def test_pending_state_is_read_from_the_newest_save(into: str, asynchronous: bool, tmp_path: Path) -> None:
    params = two()
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, tmp_path / "old")
    params, optimizer = half_resumed(tmp_path / "old", params)
    save_shampoo(optimizer, tmp_path / into, asynchronous=asynchronous).result()
    if into == "new":
        shutil.rmtree(tmp_path / "old")
    assert goes_on(optimizer, params, tmp_path / into)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, None), (None, torch.bfloat16)], ids=str)
def test_pending_state_keeps_its_saved_dtype(dtypes: Any, tmp_path: Path) -> None:
    params = two()
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, tmp_path / "0", moments_dtype=dtypes[0])
    params, optimizer = half_resumed(tmp_path / "0", params)
    save_shampoo(optimizer, tmp_path / "1", moments_dtype=dtypes[1])
    before, after = (optimizer_of(params) for _ in range(2))
    load_shampoo(before, tmp_path / "0")
    load_shampoo(after, tmp_path / "1")
    waiting = [o.waiting_state.without({"a"}).everything().to_dict() for o in (before, after) if o.waiting_state]
    assert same_bits(waiting[0], waiting[1])


def test_pending_state_may_be_in_other_groups_than_when_saved(tmp_path: Path) -> None:
    params = two()
    groups = [{"params": [("b", params[1])], "grafting": "sgd"}, {"params": [("a", params[0])]}]
    optimizer = Shampoo(groups)
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, tmp_path / "0")
    for number in range(1, 3):
        groups = [{"params": [("a", params[0])]}, {"params": [("b", params[1])], "grafting": "sgd"}]
        optimizer = Shampoo(groups)
        params[1].grad = None
        load_shampoo(optimizer, tmp_path / f"{number - 1}")
        drive(optimizer, params[:1], range(4, 5))
        save_shampoo(optimizer, tmp_path / f"{number}")
    drive(optimizer, params, range(5, 6))
    assert state_of(optimizer)["steps"] == {"a": 7, "b": 5}


def test_blocks_of_two_dtypes_in_one_group(tmp_path: Path) -> None:
    params = [parameter(8, 6), parameter(8, 6, seed=1, dtype=torch.float64)]
    for order in ((0, 1), (1, 0)):
        own = [params[n] for n in order]
        optimizer = optimizer_of(own)
        drive(optimizer, own, range(4))
        save_shampoo(optimizer, tmp_path)
        assert goes_on(optimizer, own, tmp_path)


def test_folders_of_others_stay(tmp_path: Path) -> None:
    params = two()
    (tmp_path / "data-train").mkdir()
    (tmp_path / "manifest.json.bak").write_text("mine")
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(1))
    for _ in range(2):
        save_shampoo(optimizer, tmp_path)
    assert (tmp_path / "data-train").is_dir() and (tmp_path / "manifest.json.bak").is_file()
    assert len(list(tmp_path.iterdir())) == 4


def test_a_save_is_complete_though_the_last_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    params = two()
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(1))
    save_shampoo(optimizer, tmp_path)
    drive(optimizer, params, range(1, 2))

    def busy(*_: Any, **__: Any) -> None:
        raise OSError(39, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr("shampoo_deepspeed.checkpoint.save.shutil.rmtree", busy)
        save_shampoo(optimizer, tmp_path)
    assert "Directory not empty" in caplog.text
    assert Manifest.read(tmp_path).parameters["a"]["steps"] == 2
    save_shampoo(optimizer, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("names", [("w@1", "w"), ("w@1", "w@2"), ("a/0", "a")], ids=str)
def test_names_that_look_like_our_own(names: tuple[str, str], tmp_path: Path) -> None:
    params = two()
    states = []
    for resumes in (False, True):
        optimizer = shampoo(list(zip(names, params, strict=True)))
        if resumes:
            load_shampoo(optimizer, tmp_path)
            save_shampoo(optimizer, tmp_path)
        else:
            drive(optimizer, params, range(4))
            save_shampoo(optimizer, tmp_path)
        again = [nn.Parameter(p.detach().clone()) for p in params]
        other = shampoo(list(zip(names, again, strict=True)))
        load_shampoo(other, tmp_path)
        drive(other, again, range(4, 6))
        states.append(state_of(other))
    assert set(states[0]["steps"].values()) == {6}
    assert same_bits(states[0], states[1])


def test_moments_of_soap_are_moments(tmp_path: Path) -> None:
    params = two()
    optimizer = optimizer_of(params, preconditioner="soap")
    drive(optimizer, params, range(4))
    save_shampoo(optimizer, tmp_path, moments_dtype=torch.bfloat16)
    (layout,) = Manifest.read(tmp_path).layouts.values()
    assert {name for name, dtype, _ in layout if dtype == "bfloat16"} >= {"rotated_exp_avg", "rotated_second_moment"}


def test_the_frequency_is_loaded_if_it_may_change(tmp_path: Path) -> None:
    params = two()
    optimizer = optimizer_of(params, refresh="sync", precondition_frequency=7)
    drive(optimizer, params, range(1))
    save_shampoo(optimizer, tmp_path)
    again = optimizer_of(params, refresh="sync", precondition_frequency=5)
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["precondition_frequency"] == 7


def test_state_without_some_parameters_has_none_of_their_shards() -> None:
    buffer = BufferState("momentum", [["a", [0], [3], 0], ["b", [0], [2], 3]], torch.arange(5.0))
    (left,) = SavedState({"a": 1, "b": 1}, buffers=[buffer]).without({"a"}).buffers
    assert left.shards == [["b", [0], [2], 3]]


def test_unreadable_files_are_reported_like_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    params = two()
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(1))

    def broken(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("shampoo_deepspeed.checkpoint.writer.os.pwrite", broken)
        with pytest.raises(CheckpointError, match="Input/output error"):
            save_shampoo(optimizer, tmp_path)
    assert not list(tmp_path.iterdir())
    save_shampoo(optimizer, tmp_path)
    for place in ("os.open", "os.preadv"):
        with monkeypatch.context() as patch:
            patch.setattr(place, broken)
            with pytest.raises(CheckpointError, match="Input/output error"):
                load_shampoo(optimizer, tmp_path)


def just_loaded(folder: Path) -> tuple[list[nn.Parameter], Shampoo]:
    """Return an optimizer that has loaded its own save and not read the blocks yet, and its parameters."""
    params = two()
    optimizer = optimizer_of(params)
    drive(optimizer, params, range(1))
    save_shampoo(optimizer, folder)
    load_shampoo(optimizer, folder)
    return params, optimizer


def test_state_that_cannot_be_read_when_needed_is_an_error_on_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = just_loaded(tmp_path)

    def broken(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", broken)
    with pytest.raises(CheckpointError, match="cannot be loaded: .*Input/output error"):
        drive(optimizer, params, range(1, 2))


def test_moments_are_not_saved_in_dtypes_without_their_range(tmp_path: Path) -> None:
    optimizer = optimizer_of(two())
    for dtype in (torch.float16, torch.int8):
        with pytest.raises(ValueError, match=r"moments_dtype = torch\.\w+ is not allowed: None, bfloat16"):
            save_shampoo(optimizer, tmp_path, moments_dtype=dtype)


@pytest.mark.parametrize("error", [MemoryError(), OSError(5, "Input/output error"), RuntimeError("boom")], ids=repr)
def test_state_that_fails_while_it_is_read_stays_to_be_read_again(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params, optimizer = just_loaded(tmp_path)

    text = re.escape(str(error) or repr(error))

    def broken(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("shampoo_deepspeed.checkpoint.stored_state.read_one", broken)
        with pytest.raises(CheckpointError, match=f"cannot be loaded: .*({text})") as caught:
            drive(optimizer, params, range(1, 2))
    assert caught.value.__cause__ is error
    drive(optimizer, params, range(1, 2))
    assert set(state_of(optimizer)["steps"].values()) == {2}
