"""Options from a checkpoint: those that groups share, weight decay by its effect, and allowed combinations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import CheckpointError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.options.choices import TRAINER_NO_DECAY
from tests.support.stepping import drive, parameter, same_bits, shampoo, state_of

Groups = tuple[dict[str, Any], ...]


def test_a_group_merged_from_several_keeps_its_own_options(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    w, b = parameter(8, 6), parameter(6)
    optimizer = Shampoo([{"params": [("w", w)], "lr": 0.25}, {"params": [("b", b)], "lr": 0.5}])
    drive(optimizer, [w, b], range(1))
    save_shampoo(optimizer, tmp_path)
    one = Shampoo([("w", w), ("b", b)], lr=0.75)
    load_shampoo(one, tmp_path)
    assert one.param_groups[0]["lr"] == 0.75
    assert "group 0 keeps its own lr: its parameters were in the groups 0, 1 of the checkpoint" in caplog.text


NAMES = ("weight", "norm.weight")
BY_PATTERN = ({"params": NAMES, "weight_decay": 0.25, "no_decay": ["*norm*"]},)
BY_GROUP = ({"params": NAMES[:1], "weight_decay": 0.25}, {"params": NAMES[1:], "weight_decay": 0.0})


@pytest.mark.parametrize("before, after", [(BY_PATTERN, BY_GROUP), (BY_GROUP, BY_PATTERN)])
def test_no_decay_and_groups_without_decay_continue_each_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: Groups, after: Groups
) -> None:
    """Patterns in a DeepSpeed JSON, and otherwise the Trainer's two groups, say which parameters do not decay."""
    params = [parameter(8, 6), parameter(6)]
    optimizer = in_groups(params, before, lr=0.125)
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    own = [nn.Parameter(p.detach().clone()) for p in params]
    again = in_groups(own, after, lr=0.5)
    for group in again.param_groups:
        group["weight_decay"] *= 3
    load_shampoo(again, tmp_path)
    assert [group["weight_decay"] for group in again.param_groups] == [group["weight_decay"] for group in after]
    assert all(group["lr"] == 0.125 for group in again.param_groups)
    assert "weight decay" not in caplog.text and "keeps its own" not in caplog.text
    for with_, given in ((optimizer, params), (again, own)):
        drive(with_, given, range(2, 4))
    assert same_bits([p.detach() for p in params], [p.detach() for p in own])


def test_a_changed_weight_decay_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = [parameter(8, 6), parameter(6)]
    optimizer = in_groups(params, BY_PATTERN)
    drive(optimizer, params, range(1))
    save_shampoo(optimizer, tmp_path)
    load_shampoo(in_groups(params, ({"params": NAMES, "weight_decay": 0.5},)), tmp_path, options=False)
    assert "weight decay" not in caplog.text
    again = in_groups(params, ({"params": NAMES, "weight_decay": 0.5},))
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["weight_decay"] == 0.5
    assert "2 parameters have a different weight decay than in the" in caplog.text
    assert "such as weight: 0.25 there, 0.5 here" in caplog.text


def test_options_that_differ_in_the_checkpoint_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    params = [parameter(8, 6), parameter(6)]
    named = list(zip("wb", params, strict=True))
    drive(optimizer := shampoo(named, lr=0.5, refresh="sync", precondition_frequency=2), params, range(3))
    save_shampoo(optimizer, tmp_path)
    load_shampoo(shampoo(named, lr=0.25, refresh="sync", precondition_frequency=2), tmp_path)
    assert "now uses" not in caplog.text  # a schedule's rate differs at most resumptions
    again = shampoo(named, refresh="sync", precondition_frequency=5)
    load_shampoo(again, tmp_path)
    assert "now uses the checkpoint's precondition_frequency = 2 (given here: 5)" in caplog.text
    assert again.param_groups[0]["precondition_frequency"] == 2


class Normed(nn.Module):
    """A model with a norm whose name does not show it, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.ln_1 = parameter(8, 6), nn.LayerNorm(6, bias=False)


def test_decay_by_kind_is_known_to_a_loop_that_gives_names_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = Normed()
    params = list(model.parameters())
    options: dict[str, Any] = {"weight_decay": 0.25, "no_decay": TRAINER_NO_DECAY}
    drive(optimizer := Shampoo(model.named_parameters(), model=model, **options), params, range(1))
    save_shampoo(optimizer, tmp_path)
    weight, norm = model.named_parameters()
    apart = Shampoo([{"params": [weight], "weight_decay": 0.25}, {"params": [norm], "weight_decay": 0.0}])
    load_shampoo(apart, tmp_path)
    assert [group["weight_decay"] for group in apart.param_groups] == [0.25, 0.0]
    assert "weight decay" not in caplog.text
    load_shampoo(Shampoo(model.named_parameters(), weight_decay=0.25), tmp_path)
    assert "such as ln_1.weight: 0 there, 0.25 here" in caplog.text


def test_a_group_of_parameters_that_decayed_differently_keeps_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = [parameter(8, 6), parameter(6)]
    drive(optimizer := in_groups(params, BY_PATTERN), params, range(1))
    save_shampoo(optimizer, tmp_path)
    again = in_groups(params, ({"params": NAMES, "weight_decay": 0.0},))
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["weight_decay"] == 0.0
    assert "such as weight: 0.25 there, 0 here" in caplog.text
    params[1].requires_grad_(False)  # the decay of frozen parameters has no effect
    caplog.clear()
    again = in_groups(params, ({"params": NAMES, "weight_decay": 0.0},))
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["weight_decay"] == 0.25 and "weight decay" not in caplog.text


def apart(first: dict[str, Any], second: dict[str, Any]) -> Groups:
    return ({"params": NAMES[:1], **first}, {"params": NAMES[1:], **second})


PLAIN: dict[str, Any] = {"preconditioner": "shampoo"}
OPTIONS_THAT_CLASH: list[tuple[Groups, dict[str, Any], str]] = [
    (
        apart({"momentum": 0.9, "nesterov": True}, {"momentum": 0.8, "nesterov": True}),
        {},
        "group 0 keeps its own momentum: its parameters were in the groups 0, 1",
    ),
    (({"params": NAMES, "start_preconditioning_step": 10},), {"precondition_frequency": 50}, ""),
    (
        apart(
            PLAIN | {"solver": "coupled_newton", "exponent_override": 8},
            PLAIN | {"solver": "coupled_newton", "exponent_override": 4},
        ),
        PLAIN | {"exponent_override": 2.5},
        "group 0 keeps its own options except lr, as the checkpoint's do not fit them: Shampoo option 'solver'",
    ),
]


@pytest.mark.parametrize("before, today, warning", OPTIONS_THAT_CLASH)
def test_options_are_loaded_only_in_allowed_combinations(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, before: Groups, today: dict[str, Any], warning: str
) -> None:
    """The next step finds no forbidden combination."""
    params = [parameter(8, 6), parameter(6)]
    drive(optimizer := in_groups(params, before, lr=0.125), params, range(1))
    save_shampoo(optimizer, tmp_path)
    again = in_groups(params, ({"params": NAMES},), **today)
    load_shampoo(again, tmp_path)
    assert again.param_groups[0]["lr"] == 0.125
    assert warning in caplog.text and not again.param_groups[0]["nesterov"]
    drive(again, params, range(1, 3))


def in_groups(params: list[nn.Parameter], groups: Groups, **options: Any) -> Shampoo:
    by_name = dict(zip(NAMES, params, strict=True))
    return Shampoo([{**group, "params": [(n, by_name[n]) for n in group["params"]]} for group in groups], **options)


def inference_tensor(value: float) -> torch.Tensor:
    with torch.inference_mode():
        return torch.tensor(value)


# What a group holds before the load, and whether it is the tensor that is filled.
OWN_RATES: dict[str, tuple[Callable[[], Any], bool]] = {
    "number": (lambda: 0.5, False),
    "tensor": (lambda: torch.tensor(0.5), True),
    "one element": (lambda: torch.tensor([0.5]), True),
    "float64": (lambda: torch.tensor(0.5, dtype=torch.float64), True),
    "leaf": (lambda: torch.tensor(0.5, requires_grad=True), True),
    "inference": (lambda: inference_tensor(0.5), True),
    "integer": (lambda: torch.tensor(1), False),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("name", OWN_RATES)
@pytest.mark.parametrize("key", ["lr", "initial_lr"])
def test_a_rate_is_restored_whatever_holds_it_here(key: str, name: str, inference: bool, tmp_path: Path) -> None:
    make, is_filled = OWN_RATES[name]
    params = [parameter(8, 6), parameter(6)]
    optimizer = in_groups(params, ({"params": NAMES},), lr=0.25)
    optimizer.param_groups[0]["initial_lr"] = 0.25
    drive(optimizer, params, range(2))
    save_shampoo(optimizer, tmp_path)
    again = in_groups(params, ({"params": NAMES},), lr=0.5)
    own = again.param_groups[0][key] = make()
    with torch.inference_mode(inference):
        load_shampoo(again, tmp_path)
    found = again.param_groups[0][key]
    assert float(found) == 0.25 and (found is own) == is_filled
    drive(again, params, range(2, 3))
    assert set(state_of(again)["steps"].values()) == {3}


KEPT: list[Any] = [[1, 2], "text", None, True, {"a": 1}, 3, 0.5, 1e299, float("nan"), torch.tensor(0.25)]
OWN: list[Any] = [torch.zeros(2), torch.zeros(()), torch.zeros((), dtype=torch.int64), torch.zeros(0), (1,), "x"]


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("own", OWN, ids=str)
def test_what_others_keep_is_restored_over_anything(kept: Any, own: Any, tmp_path: Path) -> None:
    w = parameter(6)
    drive(optimizer := Shampoo([("w", w)], lr=0.25), [w], range(1))
    optimizer.param_groups[0]["foo"] = kept
    save_shampoo(optimizer, tmp_path)
    again = Shampoo([("w", w)], lr=0.5)
    again.param_groups[0]["foo"] = own.clone() if isinstance(own, torch.Tensor) else own
    load_shampoo(again, tmp_path)
    found = again.param_groups[0]["foo"]
    if isinstance(found, torch.Tensor):
        assert repr(found.item()) == repr(torch.tensor(float(kept)).item())
    else:
        assert repr(list(found) if isinstance(found, tuple) else found) == repr(kept)
    assert again.param_groups[0]["lr"] == 0.25


ODD: list[dict[Any, Any]] = [
    {"foo": {"number": 3}}, {"foo": {"tensor of 0 dims": 1, "dtype": "x"}}, {"foo": [{"number": "x"}]},
    {"\ud800": 1}, {"foo": "\ud800"}, {3: 1},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=ascii)
def test_what_a_manifest_cannot_hold_is_left_out(odd: dict[Any, Any], tmp_path: Path) -> None:
    w = parameter(6)
    drive(optimizer := Shampoo([("w", w)]), [w], range(1))
    optimizer.param_groups[0].update(odd, bar=1)
    save_shampoo(optimizer, tmp_path)
    load_shampoo(again := Shampoo([("w", w)]), tmp_path)
    assert again.param_groups[0]["bar"] == 1 and not {*odd, "3"} & again.param_groups[0].keys()


@pytest.mark.parametrize("place", ["from_json", "options_record", "ParameterRegistry.refuse_dtypes", "_shared_options"])
def test_an_error_about_options_leaves_the_optimizer_as_it_was(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [parameter(8, 6), parameter(6)]
    drive(optimizer := in_groups(params, ({"params": NAMES},), lr=0.25), params, range(1))
    optimizer.param_groups[0]["foo"] = 1
    save_shampoo(optimizer, tmp_path)
    again = in_groups(params, ({"params": NAMES},), lr=0.5)
    drive(again, params, range(3))
    before = [state_of(again), {key: value for key, value in again.param_groups[0].items() if key != "params"}]

    def broken(*_: Any) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(f"shampoo_deepspeed.checkpoint.load.{place}", broken)
    with pytest.raises(RuntimeError, match="boom"):
        load_shampoo(again, tmp_path)
    now = [state_of(again), {key: value for key, value in again.param_groups[0].items() if key != "params"}]
    assert same_bits(before[0], now[0]) and before[1] == now[1]


@pytest.mark.parametrize("dtype, fits", [(torch.float16, False), (torch.bfloat16, True), (torch.float32, True)])
def test_rounding_is_restored_only_for_dtypes_that_it_can_round(
    dtype: torch.dtype, fits: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params = [parameter(8, 6, dtype=torch.bfloat16), parameter(6, dtype=torch.bfloat16)]
    rounds = {"master_weights": False, "stochastic_rounding": True}
    drive(optimizer := in_groups(params, ({"params": NAMES},), lr=0.25, **rounds), params, range(1))
    save_shampoo(optimizer, tmp_path)
    own = [nn.Parameter(p.detach().to(dtype)) for p in params]
    again = in_groups(own, ({"params": NAMES},), lr=0.5)
    load_shampoo(again, tmp_path)
    group = again.param_groups[0]
    assert group["lr"] == 0.25 and (group["stochastic_rounding"], group["master_weights"]) == (fits, not fits)
    assert ("keeps its own options except lr, as the checkpoint's do not fit them" in caplog.text) != fits
    drive(again, own, range(1, 3))


EVIL = "evil\x1b[2J\u202e\r"


@pytest.mark.parametrize("strict", [True, False])
def test_names_from_a_checkpoint_and_paths_are_printed_escaped(
    strict: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "shampoo_deepspeed")
    folder, (w, v) = tmp_path / EVIL, (parameter(8, 6), parameter(6))
    optimizer = Shampoo([{"params": [(EVIL, w)], EVIL: 1}, {"params": [("v", v)], EVIL: 2}])
    drive(optimizer, [w, v], range(1))
    save_shampoo(optimizer, folder)
    caplog.clear()
    one = Shampoo([(EVIL, w), ("v", v)], weight_decay=0.125)
    load_shampoo(one, folder)
    drive(one, [w, v], range(1, 2))
    another, messages = Shampoo([(EVIL + "2", w), ("v", v)]), []
    try:
        load_shampoo(another, folder, strict=strict)
    except CheckpointError as error:
        messages.append(str(error))
    with pytest.raises(CheckpointError) as caught:
        load_shampoo(one, tmp_path / EVIL / "none")
    messages += [str(caught.value), *(r.getMessage() for r in caplog.records if "checkpoint" in r.pathname)]
    assert all(message.replace("\n", "").isprintable() for message in messages)
    assert sum("evil\\x1b[2J" in message for message in messages) >= 4
