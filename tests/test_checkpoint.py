"""save_shampoo and load_shampoo in one process: exact, safe, and clear about what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from tests.stepping import same_bits, shampoo, snapshot, train
from tests.zoo import make_model

FORMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "one_moment": {"betas": (0.0, 0.99)},
    "other_dtypes": {"factor_dtype": "float64", "root_dtype": "bfloat16"},
    "adagrad": {"betas": (0.9, 1.0), "grafting": "adagrad"},
    "ungrafted": {"grafting": "none"},
}


def made(**options: Any) -> tuple[nn.Module, Shampoo]:
    """The odd model of the zoo and its optimizer."""
    model = make_model("odd")
    return model, shampoo(model.named_parameters(), **options)


def resumed(model: nn.Module, path: Path, **options: Any) -> tuple[nn.Module, Shampoo]:
    """A new model with the same weights, and a new optimizer with a checkpoint's state."""
    other, optimizer = made(**options)
    other.load_state_dict(model.state_dict())
    load_shampoo(optimizer, path)
    return other, optimizer


@pytest.mark.parametrize("options", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    model, optimizer = made(**options)
    train(model, optimizer, range(steps), sometimes=True)
    save_shampoo(optimizer, tmp_path)
    other, again = resumed(model, tmp_path, **options)
    for training, with_ in ((model, optimizer), (other, again)):
        train(training, with_, range(steps, steps + 7), sometimes=True)
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))


def test_what_no_step_has_claimed_is_saved_again(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(5))
    save_shampoo(optimizer, tmp_path / "a")
    other, again = resumed(model, tmp_path / "a")
    save_shampoo(again, tmp_path / "b")
    save_shampoo(again, tmp_path / "a")
    for path in ("a", "b"):
        third, optimizer3 = resumed(model, tmp_path / path)
        fourth, optimizer4 = made()
        fourth.load_state_dict(model.state_dict())
        optimizer4.load_state_dict(again.state_dict())
        for training, with_ in ((third, optimizer3), (fourth, optimizer4)):
            train(training, with_, range(5, 9))
        assert same_bits(snapshot(third.parameters()), snapshot(fourth.parameters()))
    train(model, optimizer, range(5, 9))
    train(other, again, range(5, 9))
    assert same_bits(snapshot(model.parameters()), snapshot(other.parameters()))
    assert same_bits(snapshot(model.parameters()), snapshot(third.parameters()))


def test_another_block_size_is_named(tmp_path: Path) -> None:
    model, optimizer = made()
    train(model, optimizer, range(4))
    save_shampoo(optimizer, tmp_path)
    with pytest.raises(CheckpointError, match="max_preconditioner_dim = 8, and here it is 4; set it to 8"):
        resumed(model, tmp_path, max_preconditioner_dim=4)
