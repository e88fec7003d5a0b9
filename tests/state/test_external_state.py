"""A state dict that only says where the state is: no step runs without the state, and its place is never lost."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.checkpoint.manifest import Manifest
from shampoo_deepspeed.state.dcp_state import external_entry
from tests.support.stepping import same_bits, shampoo, snapshot, train
from tests.support.zoo import make_model

WHERE = {"place": "a drawer"}


def made() -> tuple[nn.Module, Shampoo]:
    model = make_model("odd")
    return model, shampoo(model.named_parameters())


def saved_by_a_framework(path: Path, where: dict[str, str]) -> tuple[nn.Module, Shampoo, nn.Module, Shampoo]:
    """Return a training with its state in ``path``, and a new one that has loaded its state dict."""
    model, optimizer = made()
    train(model, optimizer, range(5))
    save_shampoo(optimizer, path)
    with optimizer.with_external_state(where):
        state = copy.deepcopy(optimizer.state_dict())
    other, again = made()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(state)
    return model, optimizer, other, again


def test_a_step_and_a_save_are_refused_until_it_is_loaded(tmp_path: Path) -> None:
    model, optimizer, other, again = saved_by_a_framework(tmp_path, WHERE)
    for attempt in (lambda: train(other, again, range(5, 6)), lambda: save_shampoo(again, tmp_path)):
        with pytest.raises(RuntimeError, match=r"says where .* \({'place': 'a drawer'}\); call load_shampoo"):
            attempt()
    load_shampoo(again, tmp_path)
    train(model, optimizer, range(5, 9))
    train(other, again, range(5, 9))
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))


def test_a_state_dict_taken_in_between_has_the_same_note(tmp_path: Path) -> None:
    """Some tools load an optimizer's own state dict into it, to move it to another device."""
    _, _, other, again = saved_by_a_framework(tmp_path, WHERE)
    again.load_state_dict(again.state_dict())
    assert again.state_dict()["shampoo"]["external"] == WHERE
    with pytest.raises(RuntimeError, match="call load_shampoo"):
        train(other, again, range(5, 6))


def test_one_process_resumes_from_deepspeed_s_note(tmp_path: Path) -> None:
    where = {"saved_by": "DeepSpeed", "id": "unknown yet", "path": str(tmp_path)}
    model, optimizer, other, again = saved_by_a_framework(tmp_path, where)
    with pytest.raises(CheckpointError, match=r"holds another save \(data-\w+\)\. Put the checkpoint's folder"):
        train(other, again, range(5, 6))
    state = again.state_dict()
    state["shampoo"]["external"]["id"] = Manifest.read(tmp_path).directory
    again.load_state_dict(state)
    train(model, optimizer, range(5, 9))
    train(other, again, range(5, 9))
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))


def test_another_optimizer_s_state_is_left_out_only_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = made()
    adamw = torch.optim.AdamW(model.parameters(), lr=0.25)
    train(model, optimizer, range(1))
    adamw.step()
    with pytest.raises(ValueError, match="not saved by Shampoo.*load_optimizer_states=False.*SHAMPOO_START_ANEW=1"):
        optimizer.load_state_dict(adamw.state_dict())
    assert optimizer.units
    monkeypatch.setenv("SHAMPOO_START_ANEW", "1")
    options = copy.deepcopy([{**group, "params": None} for group in optimizer.param_groups])
    optimizer.load_state_dict(adamw.state_dict())
    assert [{**group, "params": None} for group in optimizer.param_groups] == options and not optimizer.units
    train(model, optimizer, range(1))
    assert {step for unit in optimizer.units for step in unit.steps} == {1}


def test_a_note_from_an_optimizer_without_state_requires_no_state() -> None:
    """FSDP1's dict has the same entries before the first step, because it is a template for loading."""
    model, optimizer = made()
    state = optimizer.state_dict()
    del state["shampoo"]
    for external in (True, False):
        state["state"] = {
            number: external_entry(p, torch.zeros(()), external) for number, p in enumerate(model.parameters())
        }
        optimizer.load_state_dict(copy.deepcopy(state))
        assert (optimizer.external_state is not None) == external
    train(model, optimizer, range(1))
