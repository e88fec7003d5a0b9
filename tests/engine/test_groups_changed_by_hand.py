"""Parameter groups and ``state`` that a script edits between steps: as with torch's optimizers, or an error at once."""

from __future__ import annotations

import copy
import pickle
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from shampoo_deepspeed import LayoutError, OptionError, Shampoo
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of

NAMES = ("a", "b", "c", "d")


def made(**second: Any) -> tuple[list[nn.Parameter], Shampoo]:
    """Return four named parameters in two groups; the second may have other options."""
    params = [parameter(12, 10), parameter(9, 7), parameter(12, 10, seed=1), parameter(5)]
    named = list(zip(NAMES, params, strict=True))
    return params, shampoo([{"params": named[:2]}, {"params": named[2:], **second}])


def steps_of(optimizer: Shampoo) -> dict[str, int]:
    found: dict[str, int] = optimizer.state_dict()["shampoo"]["steps"]
    return found


def take_out_group(optimizer: Shampoo) -> Callable[[], None]:
    group = optimizer.param_groups.pop()
    return lambda: optimizer.param_groups.append(group)


def take_out_tensors(optimizer: Shampoo) -> Callable[[], None]:
    tensors = [optimizer.param_groups[1]["params"].pop() for _ in range(2)]
    return lambda: optimizer.param_groups[1]["params"].extend(reversed(tensors))


@pytest.mark.parametrize("takes_out", [take_out_group, take_out_tensors])
def test_what_is_in_no_group_takes_no_part_until_it_is_back(takes_out: Callable[[Shampoo], Callable[[], None]]) -> None:
    params, optimizer = made()
    others, reference = made()
    drive(optimizer, params, range(4))
    drive(reference, others, range(4))
    before = snapshot(params[2:])
    puts_back = takes_out(optimizer)
    for step in range(4, 7):
        drive(optimizer, params, [step])  # all have gradients
        reference.zero_grad()
        drive(reference, others[:2], [step])
    assert same_bits(snapshot(params[2:]), before)
    assert same_bits(snapshot(params), snapshot(others))
    puts_back()
    assert same_bits(state_of(optimizer), state_of(reference))
    drive(optimizer, params, range(7, 10))
    drive(reference, others, range(7, 10))
    assert same_bits(snapshot(params), snapshot(others))
    assert steps_of(optimizer) == {"a": 10, "b": 10, "c": 7, "d": 7}


def move(optimizer: Shampoo) -> None:
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())


def merge(optimizer: Shampoo) -> None:
    optimizer.param_groups[0]["params"] += optimizer.param_groups.pop()["params"]


@pytest.mark.parametrize("change", [move, merge])
def test_a_tensor_in_another_group_than_at_its_first_step_is_an_error(change: Callable[[Shampoo], None]) -> None:
    params, optimizer = made(lr=1e-3)
    drive(optimizer, params, range(4))
    change(optimizer)
    before = snapshot(params), state_of(optimizer)
    for _ in range(2):
        with pytest.raises(LayoutError, match="d was in another parameter group|c was in another parameter group"):
            drive(optimizer, params, [4])
    assert same_bits((snapshot(params), state_of(optimizer)), before)


def test_a_group_that_was_taken_out_is_not_added_as_a_new_one() -> None:
    params, optimizer = made()
    drive(optimizer, params, range(4))
    group = optimizer.param_groups.pop()
    with pytest.raises(OptionError, match="two parameters have the name 'c'"):
        optimizer.add_param_group({"params": list(zip(NAMES[2:], group["params"], strict=True))})
    optimizer.param_groups.append(group)
    drive(optimizer, params, range(4, 6))
    assert steps_of(optimizer) == dict.fromkeys(NAMES, 6)


def test_before_its_first_step_a_moved_tensor_gets_the_options_of_its_new_group() -> None:
    params, optimizer = made(lr=1e-3, max_preconditioner_dim=4)
    move(optimizer)
    optimizer.param_groups[0]["params"].append(optimizer.param_groups[1]["params"].pop())
    others = [nn.Parameter(p.detach().clone()) for p in params]
    named = dict(zip(NAMES, others, strict=True))
    reference = shampoo([(name, named[name]) for name in ("a", "b", "d", "c")])
    drive(optimizer, params, range(5))
    drive(reference, others, range(5))
    assert same_bits(snapshot(params), snapshot(others))


def test_a_tensor_that_joins_by_hand_is_told_of_add_param_group() -> None:
    params, optimizer = made()
    drive(optimizer, params, range(2))
    optimizer.param_groups[0]["params"].append(new := parameter(3, 3))
    with pytest.raises(LayoutError, match=r"add_param_group\(\)"):
        drive(optimizer, [*params, new], [2])


def reverse_tensors(optimizer: Shampoo) -> None:
    for group in optimizer.param_groups:
        group["params"].reverse()


def reverse_groups(optimizer: Shampoo) -> None:
    optimizer.param_groups.reverse()


def drop_group(optimizer: Shampoo) -> None:
    optimizer.param_groups.pop(0)


@pytest.mark.parametrize("change", [reverse_tensors, reverse_groups, drop_group])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_goes_on_with_each_tensors_own_state(change: Callable[[Shampoo], None], copied: Any) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(5))
    change(optimizer)
    again, resumed = copied((params, optimizer))
    drive(optimizer, params, range(5, 9))
    drive(resumed, again, range(5, 9))
    assert same_bits(snapshot(again), snapshot(params))


@pytest.mark.parametrize("change", [reverse_tensors, reverse_groups])
def test_torchs_helpers_find_each_tensors_own_state(change: Callable[[Shampoo], None]) -> None:
    def built() -> tuple[nn.Module, list[nn.Parameter], Shampoo]:
        model = nn.ParameterDict(dict(zip(NAMES, made()[0], strict=True)))
        params = list(model.values())
        named = list(model.items())
        return model, params, shampoo([{"params": named[:2]}, {"params": named[2:]}])

    model, params, optimizer = built()
    drive(optimizer, params, range(5))
    other, again, resumed = built()
    change(resumed)
    set_optimizer_state_dict(other, resumed, get_optimizer_state_dict(model, optimizer))
    with torch.no_grad():
        for target, p in zip(again, params, strict=True):
            target.copy_(p)
    drive(optimizer, params, range(5, 9))
    drive(resumed, again, range(5, 9))
    assert same_bits(snapshot(again), snapshot(params))


RESETS: dict[str, Callable[[Shampoo], None]] = {
    "clear": lambda optimizer: optimizer.state.clear(),
    "another": lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
    "setstate": lambda optimizer: optimizer.__setstate__({"state": defaultdict(dict)}),
}


@pytest.mark.parametrize("way", RESETS)
def test_without_entries_in_state_all_parameters_begin_anew(way: str) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(5))
    RESETS[way](optimizer)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    named = list(zip(NAMES, others, strict=True))
    fresh = shampoo([{"params": named[:2]}, {"params": named[2:]}])
    for step in range(5, 10):
        drive(optimizer, params, [step])
        drive(fresh, others, [step])
    assert same_bits(snapshot(params), snapshot(others))
    assert set(steps_of(optimizer).values()) == {5}


@pytest.mark.parametrize("lost", [0, 3])
def test_a_parameter_without_its_entry_in_state_begins_anew(lost: int) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(5))
    del optimizer.state[params[lost]]
    alone = nn.Parameter(params[lost].detach().clone())
    fresh = shampoo([(NAMES[lost], alone)])
    kept = [nn.Parameter(p.detach().clone()) for p in params]
    named = list(zip(NAMES, kept, strict=True))
    resumed = shampoo([{"params": named[:2]}, {"params": named[2:]}])
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    drive(optimizer, params, range(5, 10))
    drive(resumed, kept, range(5, 10))
    for step in range(5, 10):
        alone.grad = made_up(alone, step, lost)
        fresh.step()
    for number, (p, q) in enumerate(zip(params, kept, strict=True)):
        assert same_bits(p.detach(), (alone if number == lost else q).detach())
    assert steps_of(optimizer)[NAMES[lost]] == 5


def with_methods() -> tuple[list[nn.Parameter], Shampoo]:
    """Return a vector and a matrix, the vector with Adam's method."""
    params = [parameter(7), parameter(6, 5, seed=1)]
    options = {"elementwise": "adam", "grafting": "adam", "normalize_gradients": False}
    return params, shampoo([{"params": [("v", params[0])], **options}, {"params": [("m", params[1])], **options}])


@pytest.mark.parametrize(
    "changed",
    [{"elementwise": "adagrad"}, {"elementwise": "normalized_adam"}, {"elementwise": None, "grafting": "rmsprop"}],
    ids=str,
)
def test_another_method_of_element_wise_parameters_holds_from_the_next_step(changed: dict[str, Any]) -> None:
    params, optimizer = with_methods()
    drive(optimizer, params, range(4))
    again, copied = copy.deepcopy((params, optimizer))  # which builds its units anew
    unchanged, other = copy.deepcopy((params, optimizer))
    for each in (optimizer, copied):
        each.param_groups[0].update(changed)
    for each, own in ((optimizer, params), (copied, again), (other, unchanged)):
        drive(each, own, range(4, 8))
    assert same_bits(snapshot(params), snapshot(again))
    assert not torch.equal(params[0], unchanged[0])
    assert torch.equal(params[1], unchanged[1])


def test_a_method_that_was_changed_goes_back_with_a_load() -> None:
    params, optimizer = with_methods()
    drive(optimizer, params, range(4))
    saved = copy.deepcopy((optimizer.state_dict(), snapshot(params)))
    drive(optimizer, params, range(4, 8))
    wanted = snapshot(params)
    optimizer.param_groups[0]["elementwise"] = "adagrad"
    drive(optimizer, params, [8])
    optimizer.load_state_dict(saved[0])
    with torch.no_grad():
        for p, value in zip(params, saved[1], strict=True):
            p.copy_(value)
    drive(optimizer, params, range(4, 8))
    assert same_bits(snapshot(params), wanted)


def test_with_a_value_that_is_refused_all_groups_keep_their_methods() -> None:
    params, optimizer = with_methods()
    drive(optimizer, params, range(4))
    others, reference = copy.deepcopy((params, optimizer))
    optimizer.param_groups[0]["elementwise"] = "adagrad"
    optimizer.param_groups[1]["eps"] = -1.0
    with pytest.raises(OptionError, match="in parameter group 1: .*'eps' = -1.0"):
        drive(optimizer, params, [4])
    optimizer.param_groups[0]["elementwise"] = "adam"
    optimizer.param_groups[1]["eps"] = 1e-8
    drive(optimizer, params, range(4, 8))
    drive(reference, others, range(4, 8))
    assert same_bits(snapshot(params), snapshot(others))


def test_without_any_group_a_step_does_nothing() -> None:
    params, optimizer = made()
    drive(optimizer, params, range(3))
    before, groups = snapshot(params), optimizer.param_groups[:]
    optimizer.param_groups.clear()
    drive(optimizer, params, range(3, 5))
    optimizer.finish_step()
    assert same_bits(snapshot(params), before)
    optimizer.param_groups.extend(groups)
    drive(optimizer, params, [5])
    assert not torch.equal(params[0], before[0])


@pytest.mark.parametrize("kind", ["corrected", "independent"])
def test_another_kind_of_decay_scales_by_the_rate_at_that_moment(kind: str) -> None:
    params, optimizer = made()
    others, reference = made()
    drive(optimizer, params, range(3))
    drive(reference, others, range(3))
    for group in optimizer.param_groups:
        group["weight_decay_type"] = kind
    for group in reference.param_groups:
        group.update(weight_decay_type=kind, peak_lr=group["lr"])
    drive(optimizer, params, range(3, 6))
    drive(reference, others, range(3, 6))
    assert same_bits(snapshot(params), snapshot(others))
    optimizer.param_groups[0].update(lr=0.0, peak_lr=None)
    with pytest.raises(OptionError, match="'peak_lr' = None is not allowed: a number > 0 if lr starts at 0"):
        drive(optimizer, params, [6])
    assert same_bits(snapshot(params), snapshot(others))
