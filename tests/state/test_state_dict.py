"""Saving, loading, copying: the new optimizer continues to the last bit, or raises an error that says why it cannot."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed.options.choices import GRAFTING_METHODS
from shampoo_deepspeed.options.config import BEFORE
from shampoo_deepspeed.state.dcp_state import as_count
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of, through_a_file, train
from tests.support.zoo import make_model

CONTINUED: dict[str, dict[str, Any]] = {
    **{f"graft_{method}": {"grafting": method} for method in GRAFTING_METHODS},
    "momentum": {"momentum": 0.9},
    "nesterov": {"momentum": 0.9, "nesterov": True, "dampening": 0.1},
    "sums": {"betas": (0.0, 1.0)},
    "coupled_decay": {"decoupled_weight_decay": False},
    "late_start": {"start_preconditioning_step": 6},
    "other_dtypes": {"factor_dtype": "float64", "root_dtype": "bfloat16"},
    "soap": {"preconditioner": "soap"},
    "soap_graft_rms": {"preconditioner": "soap", "grafting": "rms"},
    "soap_other_dtypes": {"preconditioner": "soap", "factor_dtype": "float64", "root_dtype": "bfloat16"},
    "kl_shampoo": {"preconditioner": "kl_shampoo"},
    "memory_adamw": {"memory": "adamw"},
    "kl_soap_half": {"preconditioner": "kl_soap", "memory": "half"},
    "kept_bases": {"refresh_tolerance": 0.5},
    "qr": {"solver": "qr"},
    "kl_soap": {"preconditioner": "kl_soap"},
    "soap_muon": {"preconditioner": "soap_muon"},
    "muon": {"preconditioner": "muon"},
    "muon_ungrafted": {"preconditioner": "muon", "grafting": "none"},
    "soap_eigh": {"preconditioner": "soap", "solver": "eigh"},
    "kl_shampoo_kept_bases": {"preconditioner": "kl_shampoo", "refresh_tolerance": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CONTINUED))
def test_a_saved_optimizer_continues_to_the_last_bit(name: str) -> None:
    """It is saved between two refreshes (3 and 6), and the steps after it contain two more."""
    model = make_model("odd")
    optimizer = shampoo(model.named_parameters(), **CONTINUED[name])
    train(model, optimizer, range(4), sometimes=True)
    saved = through_a_file(optimizer.state_dict())
    other = copy.deepcopy(model)
    fresh = shampoo(other.named_parameters(), **CONTINUED[name])
    fresh.load_state_dict(saved)
    assert same_bits(fresh.state_dict()["shampoo"], saved["shampoo"])
    train(model, optimizer, range(4, 10), sometimes=True)
    train(other, fresh, range(4, 10), sometimes=True)
    assert same_bits(snapshot(other.parameters()), snapshot(model.parameters()))
    assert same_bits(by_key(fresh), by_key(optimizer))


def test_a_state_saved_before_the_first_step_is_a_fresh_start() -> None:
    model = make_model("odd")
    optimizer = shampoo(model.named_parameters())
    saved, other = through_a_file(optimizer.state_dict()), copy.deepcopy(model)
    fresh = shampoo(other.named_parameters(), lr=1.23)
    fresh.load_state_dict(saved)
    train(model, optimizer, range(4))
    train(other, fresh, range(4))
    assert same_bits(snapshot(other.parameters()), snapshot(model.parameters()))


def test_loading_into_an_optimizer_that_has_stepped_replaces_everything() -> None:
    model, other = make_model("odd"), make_model("odd")
    optimizer, used = (shampoo(m.named_parameters(), momentum=0.9) for m in (model, other))
    train(model, optimizer, range(4))
    train(other, used, range(20, 25))
    used.load_state_dict(through_a_file(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(4, 8))
    train(other, used, range(4, 8))
    assert same_bits(snapshot(other.parameters()), snapshot(model.parameters()))


@pytest.mark.parametrize("steps", [0, 2])
def test_loading_an_early_state_forgets_what_came_later(steps: int) -> None:
    """Parameters without state in the loaded dict, one or all of them, start with new state."""
    early, late, early_twin, late_twin = (parameter(12, 10) for _ in range(4))
    optimizer = shampoo([early, late, bias := parameter(4)], momentum=0.9)
    twin = shampoo([early_twin, late_twin, bias_twin := parameter(4)], momentum=0.9)
    drive(optimizer, [early], range(steps))
    drive(twin, [early_twin], range(steps))
    saved, values = copy.deepcopy(optimizer.state_dict()), snapshot([early, late, bias])
    drive(optimizer, [early, late, bias], range(10, 15))
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        for p, value in zip([early, late, bias], values, strict=True):
            p.copy_(value)
    drive(optimizer, [early, late, bias], range(2, 7))
    drive(twin, [early_twin, late_twin, bias_twin], range(2, 7))
    assert same_bits([early, late, bias], [early_twin, late_twin, bias_twin])


def test_parameters_without_new_gradients_keep_their_state_over_several_saves() -> None:
    """At each save, some parameters have loaded state that the present optimizer has not needed yet."""
    shapes = [(12, 10), (5,), (10, 9), (7,)]
    params, twins = ([parameter(*shape, seed=n) for n, shape in enumerate(shapes)] for _ in range(2))
    optimizer, twin = shampoo(params, momentum=0.5), shampoo(twins, momentum=0.5)
    for begin, some in ((0, range(4)), (3, range(2)), (6, range(2, 4)), (9, range(1)), (12, range(4))):
        for opt, own in ((optimizer, params), (twin, twins)):
            opt.zero_grad()
            drive(opt, [own[n] for n in some], range(begin, begin + 3), salt=some.start)
        saved = through_a_file(optimizer.state_dict())
        optimizer = shampoo(params, momentum=0.5)
        optimizer.load_state_dict(saved)
    assert same_bits(snapshot(params), snapshot(twins))
    assert same_bits(by_key(optimizer), by_key(twin))


def test_options_of_the_state_dict_win_as_in_torch() -> None:
    p, other = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([p], lr=3e-3, grafting="rmsprop", max_preconditioner_dim=5)
    fresh = shampoo([other])
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    group = fresh.param_groups[0]
    assert (group["lr"], group["grafting"], group["max_preconditioner_dim"]) == (3e-3, "rmsprop", 5)
    drive(optimizer, [p], range(5))
    drive(fresh, [other], range(5))
    assert torch.equal(p, other)


def test_options_that_a_state_dict_replaces_are_named(caplog: pytest.LogCaptureFixture) -> None:
    """As `load_shampoo` does. Else a run that resumes with other options seems to use them."""
    saved = shampoo([parameter(12, 10)], lr=0.5, precondition_frequency=3).state_dict()
    shampoo([parameter(12, 10)], lr=0.25, precondition_frequency=3).load_state_dict(saved)
    assert "now uses" not in caplog.text  # a schedule's rate differs at most resumptions
    other = shampoo([parameter(12, 10)], precondition_frequency=7, preconditioner="soap")
    other.load_state_dict(saved)
    given = saved["param_groups"][0]["preconditioner"]
    named = f"precondition_frequency = 3 (given here: 7), preconditioner = {given!r} (given here: 'soap')"
    assert all(part in caplog.text for part in ("group 0 now uses the loaded state dict's", *named.split(", ")))
    other.load_state_dict(saved)
    assert caplog.text.count("now uses") == 1


def test_an_option_that_an_older_state_does_not_know_has_its_default() -> None:
    p = parameter(12, 10)
    saved = shampoo([parameter(12, 10)]).state_dict()
    del saved["param_groups"][0]["relative_epsilon"]
    optimizer = shampoo([p], relative_epsilon=0.5)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["relative_epsilon"] == 1e-4
    drive(optimizer, [p], range(4))


def test_an_option_that_came_later_than_a_state_has_the_value_of_what_was_done_then() -> None:
    """Today's default would train the rest of that run in another way."""
    p, twin = parameter(12, 10), parameter(12, 10)
    written = shampoo([p], **BEFORE)
    drive(written, [p], range(4))
    saved = through_a_file(written.state_dict())
    for name in BEFORE:
        del saved["param_groups"][0][name]
    optimizer = shampoo([twin], preconditioner="shampoo")
    optimizer.load_state_dict(saved)
    assert {name: optimizer.param_groups[0][name] for name in BEFORE} == BEFORE
    with torch.no_grad():
        twin.copy_(p)
    for which, group in ((written, [p]), (optimizer, [twin])):
        drive(which, group, range(4, 8))
    assert torch.equal(p, twin)


def test_the_state_dict_holds_builtins_and_tensors_only() -> None:
    model = make_model("odd")
    optimizer = shampoo(model.named_parameters(), lr=torch.tensor(0.01), momentum=0.9)
    train(model, optimizer, range(4))

    def check(value: Any) -> None:
        assert type(value) in (dict, list, tuple, str, int, float, bool, torch.Tensor, type(None)), type(value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            check(inner)

    check(optimizer.state_dict())


def test_a_foreign_state_dict_is_a_clear_error_and_changes_nothing() -> None:
    p, twin = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([p])
    drive(optimizer, [p], range(4))
    adamw = torch.optim.AdamW([twin], lr=0.5)
    drive(adamw, [twin], range(2))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="not saved by Shampoo"):
        optimizer.load_state_dict(adamw.state_dict())
    newer = {**before, "shampoo": {**before["shampoo"], "format": 99}}
    with pytest.raises(ValueError, match="format 99 is unknown here; this version reads 1"):
        optimizer.load_state_dict(newer)
    assert same_bits(optimizer.state_dict(), before)


Shapes = dict[str, tuple[int, ...]]
# Saved parameters and options, present parameters, and the error.
MISFITS: dict[str, tuple[Shapes, dict[str, Any], Shapes, str]] = {
    "other_blocks": ({"p": (12, 10)}, {"max_preconditioner_dim": 5}, {"p": (12, 10)}, "max_preconditioner_dim"),
    "other_rows": ({"p": (11, 10)}, {}, {"p": (12, 10)}, r"block p/\d of shape .* shape \(12, 10\) does not have"),
    "more_blocks": ({"p": (16, 8)}, {}, {"p": (8, 8)}, r"block p/1 of shape \(8, 8\).*shape \(8, 8\) does not have"),
    "fewer_blocks": ({"p": (8, 8)}, {}, {"p": (16, 8)}, "steps of 'p', but not its block 'p/1'"),
    "flattened": ({"p": (8, 8)}, {}, {"p": (64,)}, r"block p/0 .* parameter of shape \(64,\) does not have"),
    "excluded": ({"p": (12, 10)}, {"exclude": ["p"]}, {"p": (12, 10)}, "up to element 120, but .* preconditioned"),
    "longer": ({"p": (6,)}, {}, {"p": (5,)}, r"'p' up to element 6, but .* element-wise with shape \(5,\)"),
    "shorter": ({"p": (4,)}, {}, {"p": (5,)}, "holds 4 of the 5 elements of p"),
    "other_names": ({"q": (12, 10)}, {}, {"p": (12, 10)}, "belongs to other parameters: q are not here"),
    "no_names": ({"": (12, 10)}, {}, {"p": (12, 10)}, "belongs to other parameters: group0.0 are not here"),
}


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("name", list(MISFITS))
def test_a_state_that_does_not_fit_is_a_clear_error(name: str, stepped: bool) -> None:
    """The error comes at loading if the blocks are known, else at the first step; state is never silently replaced."""
    then, options, now, message = MISFITS[name]
    old = {key: parameter(*shape) for key, shape in then.items()}
    saving = shampoo(old.items() if all(old) else old.values(), **options)
    drive(saving, list(old.values()), range(4))
    saved = through_a_file(saving.state_dict())
    # Otherwise a fresh optimizer would take these options from the state.
    saved["param_groups"][0].update(max_preconditioner_dim=8, exclude=())
    own = {key: parameter(*shape) for key, shape in now.items()}
    optimizer = shampoo(own.items())
    drive(optimizer, list(own.values()), range(2) if stepped else [])
    values, before = snapshot(own.values()), copy.deepcopy(optimizer.state_dict())
    if stepped or name in ("other_names", "no_names"):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)
        assert same_bits(optimizer.state_dict(), before)
    else:
        optimizer.load_state_dict(saved)
        with pytest.raises(ValueError, match=message):
            drive(optimizer, list(own.values()), [2])
    assert same_bits(snapshot(own.values()), values)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_groups_with_other_moments_may_start_at_other_times(order: tuple[int, int]) -> None:
    """The first save has only one group, and so only one kind of moment."""
    params, twins = ([parameter(5), parameter(5)] for _ in range(2))
    plain, adam = {"elementwise": "sgd", "betas": (0.0, 0.9)}, {"betas": (0.9, 0.9)}

    def build(own: list[nn.Parameter]) -> Shampoo:
        return shampoo([{"params": [own[0]], **plain}, {"params": [own[1]], **adam}])

    optimizer, twin = build(params), build(twins)
    for opt, own in ((optimizer, params), (twin, twins)):
        drive(opt, [own[order[0]]], range(3))
    fresh = build(params)
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for opt, own in ((fresh, params), (twin, twins)):
        drive(opt, own, range(3, 6))
    assert same_bits(snapshot(params), snapshot(twins))
    last = build(params)
    last.load_state_dict(through_a_file(fresh.state_dict()))
    for opt, own in ((last, params), (twin, twins)):
        drive(opt, own, range(6, 9))
    assert same_bits(snapshot(params), snapshot(twins))


def test_state_dict_hooks_see_the_whole_state_dict_and_may_replace_it() -> None:
    p, other = parameter(12, 10), parameter(12, 10)
    optimizer, fresh = shampoo([p]), shampoo([other])
    drive(optimizer, [p], range(4))
    optimizer.register_state_dict_post_hook(lambda _, state: {"packed": state["shampoo"], **state})
    fresh.register_load_state_dict_pre_hook(
        lambda _, state: {"shampoo": state["packed"], "state": {}, "param_groups": state["param_groups"]}
    )
    saved = optimizer.state_dict()
    del saved["shampoo"]
    fresh.load_state_dict(saved)
    assert same_bits(fresh.state_dict()["shampoo"], saved["packed"])


def pickled(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


COPIES: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "pickle": pickled}


@pytest.mark.parametrize("steps", [0, 4])
@pytest.mark.parametrize("how", list(COPIES))
def test_a_model_and_its_optimizer_copied_together_continue_on_their_own(how: str, steps: int) -> None:
    model = make_model("odd")
    optimizer = shampoo(model.named_parameters(), momentum=0.9)
    train(model, optimizer, range(steps))
    twin, twin_optimizer = COPIES[how]((model, optimizer))
    held, held_state = snapshot(twin.parameters()), state_of(twin_optimizer)
    train(model, optimizer, range(steps, 9))
    assert same_bits(snapshot(twin.parameters()), held)
    assert same_bits(state_of(twin_optimizer), held_state)
    train(twin, twin_optimizer, range(steps, 9))
    assert same_bits(snapshot(twin.parameters()), snapshot(model.parameters()))
    assert same_bits(by_key(twin_optimizer), by_key(optimizer))


@pytest.mark.parametrize("how", list(COPIES))
def test_an_optimizer_copied_alone_brings_its_own_parameters(how: str) -> None:
    model = nn.Sequential(nn.Linear(10, 12), nn.Linear(12, 3))
    optimizer = shampoo(model.parameters())
    drive(optimizer, list(model.parameters()), range(4))
    twin = COPIES[how](optimizer)
    own = twin.param_groups[0]["params"]
    drive(twin, own, range(4, 8))
    drive(optimizer, list(model.parameters()), range(4, 8))
    assert same_bits(snapshot(own), snapshot(model.parameters()))
    assert {id(p) for p in own}.isdisjoint(id(p) for p in model.parameters())


@pytest.mark.parametrize("how", list(COPIES))
def test_a_copy_takes_more_groups(how: str) -> None:
    p, added = parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([p])
    drive(optimizer, [p], range(4))
    twin = COPIES[how](optimizer)
    for opt in (optimizer, twin):
        opt.add_param_group({"params": [added.detach().clone().requires_grad_()], "lr": 5e-3})
        drive(opt, [p for group in opt.param_groups for p in group["params"]], range(4, 8))
    left, right = ([p for group in opt.param_groups for p in group["params"]] for opt in (optimizer, twin))
    assert same_bits(snapshot(left), snapshot(right))


def by_key(optimizer: Shampoo) -> dict[Any, Any]:
    """Return the state of each block and element-wise parameter, independent of stacks."""
    own = optimizer.state_dict()["shampoo"]
    out: dict[Any, Any] = {}
    for stack in own["stacks"]:
        for row, key in enumerate(stack["keys"]):
            out[key] = {name: stack[name][row] for name in ("refreshed", "failures")}
            out[key]["steps"] = own["steps"][key.rsplit("/", 1)[0]]
            out[key] |= {name: tensor[row] for name, tensor in stack["tensors"].items()}
    for part in own["elementwise"]:
        begin = 0
        for key, _, numel in part["segments"]:
            tensors = {name: tensor[begin : begin + numel] for name, tensor in part["tensors"].items()}
            assert key not in out, f"{key} has state twice"
            out[key] = {"steps": own["steps"][key], **tensors}
            begin += numel
    for buffer in own["buffers"]:
        for key, _, _, _ in buffer["shards"]:
            assert ("momentum", key) not in out, f"{key} has momentum twice"
            out["momentum", key] = buffer["buffer"]
    return out


def test_groups_with_and_without_momentum_go_on_together() -> None:
    def build() -> tuple[Shampoo, list[torch.nn.Parameter]]:
        one, two = parameter(12, 10), parameter(10, 9)
        return shampoo([{"params": [one], "momentum": 0.9}, {"params": [two]}]), [one, two]

    optimizer, params = build()
    fresh, copies = build()
    drive(optimizer, params, range(4))
    fresh.load_state_dict(through_a_file(optimizer.state_dict()))
    for p, copied in zip(params, copies, strict=True):
        copied.data.copy_(p)
    drive(optimizer, params, range(4, 8))
    drive(fresh, copies, range(4, 8))
    assert same_bits(snapshot(params), snapshot(copies))


@pytest.mark.parametrize(
    ("at_first", "later"),
    [
        ({"grafting": "sgd"}, {"grafting": "adam"}),
        ({"grafting": "adam"}, {"grafting": "rms"}),
        ({"grafting": "sgd"}, {"elementwise": "adam"}),
        ({"preconditioner": "soap", "grafting": "rms"}, {"grafting": "adam"}),
        ({"preconditioner": "soap", "grafting": "adam"}, {"grafting": None}),
        ({"betas": (0.0, 0.9)}, {"betas": (0.9, 0.9)}),
        ({}, {"max_preconditioner_dim": 4}),
        ({}, {"exclude": ("*",)}),
        ({}, {"no_decay": ("*",)}),
        ({}, {"factor_dtype": "float64"}),
        ({}, {"factor_format": "packed"}),
        ({}, {"root_format": "int8"}),
        ({"moment_format": "bfloat16"}, {"moment_format": "float32"}),
        ({}, {"elementwise_format": "bfloat16"}),
        ({}, {"preconditioner": "soap"}),
        ({"preconditioner": "kl_shampoo"}, {"preconditioner": "shampoo"}),
        ({"refresh_tolerance": 0.1}, {"refresh_tolerance": None}),
        ({}, {"solver": "qr"}),
        ({"solver": "qr"}, {"solver": "eigh"}),
        ({"preconditioner": "soap"}, {"preconditioner": "kl_soap"}),
        ({"preconditioner": "muon"}, {"max_preconditioner_dim": 4}),
    ],
)
def test_options_that_shape_state_cannot_change_on_the_way(at_first: dict[str, Any], later: dict[str, Any]) -> None:
    p = parameter(12, 10)
    optimizer = shampoo([p], **at_first)
    drive(optimizer, [p], range(2))
    optimizer.param_groups[0].update(later)
    (name,) = later
    values = snapshot([p])
    with pytest.raises(ValueError, match=f"{name}.* is not allowed: it was "):
        drive(optimizer, [p], range(2, 3))
    assert same_bits(snapshot([p]), values)


def test_a_state_dict_with_a_bad_option_changes_nothing() -> None:
    p = parameter(12, 10)
    optimizer = shampoo([p])
    drive(optimizer, [p], range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["eps"] = -1.0
    with pytest.raises(ValueError, match="'eps' = -1.0"):
        optimizer.load_state_dict(saved)
    drive(optimizer, [p], range(2, 4))
    assert optimizer.param_groups[0]["eps"] >= 0


EXTERNAL = {"format": 1, "external": {"place": "elsewhere"}}


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize(
    "options", [{"lr": float("nan")}, {"stochastic_rounding": True, "master_weights": False}, {"betas": (0.9, 2.0)}]
)
def test_options_that_are_not_allowed_here_leave_the_state(options: dict[str, Any], external: bool) -> None:
    p = parameter(6, 5, dtype=torch.float16)
    optimizer = shampoo([("w", p)])
    drive(optimizer, [p], range(4))
    before = state_of(optimizer), optimizer.param_groups[0]["lr"]
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0].update(options)
    if external:
        state["shampoo"] = EXTERNAL
    with pytest.raises(OptionError, match="lr|stochastic_rounding|betas"):
        optimizer.load_state_dict(state)
    assert same_bits((state_of(optimizer), optimizer.param_groups[0]["lr"]), before)
    drive(optimizer, [p], [4])
    assert state_of(optimizer)["steps"] == {"w": 5}


def first_stack(own: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = own["stacks"][0]
    return found


DAMAGE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no steps": lambda own: own.pop("steps"),
    "no stacks": lambda own: own.pop("stacks"),
    "no keys": lambda own: first_stack(own).pop("keys"),
    "another field": lambda own: first_stack(own).update(more=1),
    "a list of steps": lambda own: own.update(steps=[1, 2]),
    "a number of steps": lambda own: own.update(steps=3),
    "steps in words": lambda own: own["steps"].update(w="x"),
    "no number": lambda own: own["steps"].update(w=None),
    "many steps": lambda own: own["steps"].update(w=10**400),
    "fewer than none": lambda own: own["steps"].update(w=-3),
    "rejected": lambda own: own.update(rejected_steps="many"),
    "rejected, fewer than none": lambda own: own.update(rejected_steps=-1),
    "refreshed": lambda own: first_stack(own).update(refreshed=[]),
    "failures": lambda own: first_stack(own).update(failures=[]),
    "failures in words": lambda own: first_stack(own).update(failures=["x"] * len(first_stack(own)["keys"])),
    "pending": lambda own: first_stack(own).update(pending=None),
    "rows": lambda own: first_stack(own)["tensors"].update(factor_0=torch.zeros(1, 8, 8)),
    "no tensor": lambda own: first_stack(own)["tensors"].update(factor_0=7),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_state_is_one_clear_error_and_changes_nothing(damage: str) -> None:
    params = [parameter(16, 16), parameter(5)]
    optimizer = shampoo(list(zip(("w", "b"), params, strict=True)))
    drive(optimizer, params, range(4))
    before = state_of(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    DAMAGE[damage](state["shampoo"])
    with pytest.raises(ValueError, match=r"the 'shampoo' entry of this state dict is damaged|the saved state of "):
        optimizer.load_state_dict(state)
    assert same_bits(state_of(optimizer), before)
    drive(optimizer, params, [4])


def test_a_state_dict_may_bring_other_options_to_an_optimizer_that_has_stepped() -> None:
    saving, own = parameter(12, 10), parameter(12, 10)
    other = shampoo([saving], grafting="sgd")
    drive(other, [saving], range(3))
    optimizer = shampoo([own])
    drive(optimizer, [own], range(2))
    optimizer.load_state_dict(through_a_file(other.state_dict()))
    own.data.copy_(saving)
    drive(other, [saving], range(3, 7))
    drive(optimizer, [own], range(3, 7))
    assert same_bits(snapshot([own]), snapshot([saving]))


def test_a_16_bit_default_dtype_rounds_no_counters() -> None:
    """bfloat16 cannot represent 1,001, and some scripts set it as default while they build a model."""
    p = parameter(8, 6)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = shampoo([("w", p)], refresh="background", precondition_frequency=2)
        saved = optimizer.state_dict()
        drive(optimizer, [p], range(3))
        entry = optimizer.state[p]["step"]
        counts = as_count(1001)
    finally:
        torch.set_default_dtype(default)
    assert saved["shampoo"]["steps"] == {} and entry.dtype == counts.dtype == torch.float32
    assert (float(entry), float(counts)) == (3.0, 1001.0)
    assert all(t.dtype == torch.float32 for stack in state_of(optimizer)["stacks"] for t in stack["tensors"].values())


@pytest.mark.parametrize("preconditioner", ["shampoo", "soap", "kl_shampoo"])
def test_the_optimizer_s_own_tensors_ignore_the_default_device(preconditioner: str, tmp_path: Path) -> None:
    """The meta device holds no values."""
    p = parameter(8, 6)
    torch.set_default_device("meta")
    try:
        options = {"preconditioner": preconditioner, "precondition_frequency": 2, "refresh": "background"}
        optimizer = shampoo([("w", p)], **options)
        drive_here(optimizer, p, 4)
        save_shampoo(optimizer, tmp_path / "one", packed_factors=True)
        save_shampoo(optimizer, tmp_path / "two", asynchronous=True).result()
        other = shampoo([("w", p)], **options)
        load_shampoo(other, tmp_path / "one")
        drive_here(other, p, 1)
        other.load_state_dict(optimizer.state_dict())
        drive_here(other, p, 1)
    finally:
        torch.set_default_device(None)
    assert set(state_of(other)["steps"].values()) == {5}
    assert torch.isfinite(p).all() and p.device.type == "cpu"


def drive_here(optimizer: Shampoo, p: nn.Parameter, steps: int) -> None:
    for _ in range(steps):
        p.grad = p.detach() * 0.5 + 0.125
        optimizer.step()
