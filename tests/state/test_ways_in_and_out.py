"""Every way to take state out and put it in, one after the other, at every moment: the run goes on to the last bit."""

from __future__ import annotations

import copy
import io
import itertools
import pickle
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from tests.support.stepping import made_up, same_bits, shampoo, snapshot, state_of, through_a_file


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = ((12, 10), (9, 6), (6, 7), (5,))
        self.used, self.frozen, self.spare, self.bias = (nn.Parameter(torch.randn(shape)) for shape in shapes)


Run = tuple[Model, Shampoo]


def made(weights: nn.Module | None = None) -> Run:
    """Return a model and an optimizer with blocks, moments of element-wise parameters and momentum."""
    model = Model()
    optimizer = shampoo(model.named_parameters(), momentum=0.5, refresh="staggered")
    if weights is not None:
        model.load_state_dict(weights.state_dict())
        for own, other in zip(model.parameters(), weights.parameters(), strict=True):
            own.requires_grad_(other.requires_grad)  # after the optimizer was built, as refreshes depend on it then
    return model, optimizer


def steps(run: Run, numbers: range, without: str = "") -> None:
    """Take steps with made-up gradients for the trainable parameters, except one."""
    model, optimizer = run
    for step in numbers:
        optimizer.zero_grad()
        for number, (name, p) in enumerate(model.named_parameters()):
            if p.requires_grad and name != without:
                p.grad = made_up(p, step, number)
        optimizer.step()
    optimizer.zero_grad()


def by_state_dict(run: Run) -> Run:
    again = made(run[0])
    again[1].load_state_dict(through_a_file(run[1].state_dict()))
    return again


def by_copy(run: Run) -> Run:
    return copy.deepcopy(run)


def by_pickle(run: Run) -> Run:
    copied: Run = pickle.loads(pickle.dumps(run))
    return copied


def by_helpers(**options: Any) -> Callable[[Run], Run]:
    def move(run: Run) -> Run:
        again, how = made(run[0]), StateDictOptions(**options)
        set_optimizer_state_dict(*again, get_optimizer_state_dict(*run, options=how), options=how)
        return again

    return move


def by_file(run: Run) -> Run:
    again = made(run[0])
    with tempfile.TemporaryDirectory() as folder:
        save_shampoo(run[1], folder)
        load_shampoo(again[1], folder)
        again[1].state_dict()
        moved = copy.deepcopy(again)  # it reads the files, which go now
    return moved


WAYS: dict[str, Callable[[Run], Run]] = {
    "state_dict": by_state_dict,
    "deepcopy": by_copy,
    "pickle": by_pickle,
    "nested": by_helpers(),
    "flat": by_helpers(flatten_optimizer_state_dict=True),
    "full": by_helpers(full_state_dict=True, cpu_offload=True),
    "file": by_file,
}
MOMENTS = ("fresh", "trained", "unused since", "frozen", "frozen between")


# Every pair of two ways, and of a way and a moment, each first and second.
CASES = [
    (first, second, MOMENTS[(a + b) % len(MOMENTS)])
    for (a, first), (b, second) in itertools.product(enumerate(WAYS), enumerate(WAYS))
]


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second", "moment"), CASES)
def test_a_state_moved_twice_without_a_step_between_continues_to_the_bit(first: str, second: str, moment: str) -> None:
    run = made()
    before = 0 if moment == "fresh" else 4
    steps(run, range(before))
    if moment == "frozen":
        run[0].frozen.requires_grad_(False)
        steps(run, range(before, before + 2))
        before += 2
    moved = WAYS[first](run)
    if moment == "frozen between":
        run[0].frozen.requires_grad_(False)
        moved[0].frozen.requires_grad_(False)
    moved = WAYS[second](moved)
    for trained in (run, moved):
        steps(trained, range(before, before + 3), without="spare" if moment == "unused since" else "")
    moved = WAYS[first](moved)
    for trained in (run, moved):
        trained[0].requires_grad_(True)
        steps(trained, range(before + 3, before + 7))
    assert same_bits(snapshot(run[0].parameters()), snapshot(moved[0].parameters()))
    assert by_block(run[1]) == by_block(moved[1])


@pytest.mark.parametrize("way", list(WAYS))
def test_the_state_of_a_run_that_ended_with_failed_roots_resumes(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error advises other options, with which this state must be of use; one more failure is an error again."""

    def refuse(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    run = made()
    steps(run, range(4))
    run[1].param_groups[0]["failure_limit"] = 2
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", refuse)
        with pytest.raises(RuntimeError, match="failed 2 times in a row"):
            steps(run, range(4, 20))
    saved = by_block(run[1])
    cured, ends = WAYS[way](run), WAYS[way](run)
    for resumed in (cured, ends):
        resumed[1].param_groups[0]["failure_limit"] = 2
        assert by_block(resumed[1]) == saved
    steps(cured, range(20, 30))
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "eigh", refuse)
        with pytest.raises(RuntimeError, match="failed 2 times in a row"):
            steps(ends, range(20, 30))


def by_block(optimizer: Shampoo) -> dict[Any, Any]:
    """Return the steps, and the state of each block and element-wise parameter as bytes, whatever stack it is in."""
    own = state_of(optimizer)
    out: dict[Any, Any] = {"steps": own["steps"]}
    for stack in own["stacks"]:
        for row, key in enumerate(stack["keys"]):
            out[key] = {name: tensor[row].numpy().tobytes() for name, tensor in stack["tensors"].items()}
    for part in own["elementwise"]:
        starts = itertools.accumulate((segment[2] for segment in part["segments"]), initial=0)
        for (key, _, numel), start in zip(part["segments"], starts, strict=False):
            out[key] = {n: t[start : start + numel].numpy().tobytes() for n, t in part["tensors"].items()}
    return out


@pytest.mark.parametrize("way", [name for name in WAYS if name != "file"])
def test_what_wrappers_keep_in_the_state_of_parameters_goes_along(way: str) -> None:
    """Some names are those of parts of our own state; a flattened dict brings them back though none is here yet."""
    run = made()
    values: dict[str, dict[str, Any]] = {}
    steps(run, range(3))
    run[0].frozen.requires_grad_(False)
    for number, (name, p) in enumerate(run[0].named_parameters()):
        values[name] = {key: made_up(p, number, salt) for salt, key in enumerate(("z", "momentum", "other_momentum"))}
        # In a full dict, torch itself loads no numbers that the new optimizer's state does not have yet.
        values[name]["nested"] = {"old_p": made_up(p, number, 9)} | ({} if way == "full" else {"count": number})
        run[1].state[p].update(copy.deepcopy(values[name]))
    moved = WAYS[way](WAYS[way](run))
    for trained in (run, moved):
        steps(trained, range(3, 7))
        for name, p in trained[0].named_parameters():
            assert same_bits({k: v for k, v in trained[1].state[p].items() if k != "step"}, values[name])
    assert same_bits(snapshot(run[0].parameters()), snapshot(moved[0].parameters()))
    assert by_block(run[1]) == by_block(moved[1])


@pytest.mark.parametrize("taken", [0, 3])
@pytest.mark.parametrize("way", list(WAYS))
def test_what_wrappers_keep_before_the_first_step_stays(way: str, taken: int) -> None:
    """A file holds Shampoo's own state only, and loading it leaves what others keep alone."""
    run = made()
    steps(run, range(taken))
    run[1].state[run[0].used]["z"] = torch.ones(12, 10)
    moved = WAYS[way](run)
    if way == "file":
        with tempfile.TemporaryDirectory() as folder:
            save_shampoo(run[1], folder)
            load_shampoo(run[1], folder)
            steps(run, range(taken, taken + 1))
        moved = run
    assert torch.equal(moved[1].state[moved[0].used]["z"], torch.ones(12, 10))


def test_a_note_of_external_state_keeps_what_others_have() -> None:
    run, again = made(), made()
    steps(run, range(2))
    run[1].state[run[0].used]["z"] = torch.ones(12, 10)
    for tool in (False, True):
        with run[1].with_external_state({"place": "a drawer"}):
            state: Any = get_optimizer_state_dict(*run) if tool else through_a_file(run[1].state_dict())
        set_optimizer_state_dict(*again, state) if tool else again[1].load_state_dict(state)
        assert torch.equal(again[1].state[again[0].used].pop("z"), torch.ones(12, 10))
        assert again[1].external_state is not None
        for copied in (copy.deepcopy(again), by_pickle(again)):
            with pytest.raises(RuntimeError, match="call load_shampoo"):
                steps(copied, range(1))


OWN_KEYS: dict[Any, Any] = {"epoch": 3, "ema": {"decay": 0.5}, ("a", 1): [1, 2], "buffer": torch.ones(3)}


@pytest.mark.parametrize("way", ["state_dict", "deepcopy", "pickle"])
def test_users_own_entries_in_the_state_go_along(way: str) -> None:
    run = made()
    for taken in (0, 3):
        steps(run, range(taken))
        run[1].state.update(OWN_KEYS)
        moved = WAYS[way](WAYS[way](run))
        assert same_bits({key: moved[1].state[key] for key in OWN_KEYS}, OWN_KEYS)
        steps(moved, range(1))
        assert same_bits({key: moved[1].state[key] for key in OWN_KEYS}, OWN_KEYS)
    with pytest.raises(RuntimeError, match=r"optimizer.state has an entry 'epoch', which is no parameter"):
        get_optimizer_state_dict(*run)


def test_hooks_run_as_in_torch() -> None:
    """Hooks before a save may still change the state; hooks after a load see it, and may change it."""
    run, again = made(), made()
    steps(run, range(4))
    expected = state_of(run[1])
    seen: list[Any] = []
    run[1].register_state_dict_pre_hook(lambda own: own.state[run[0].used].update(z=torch.ones(2)))
    run[1].register_state_dict_post_hook(lambda _, state: seen.append(sorted(state)))
    again[1].register_load_state_dict_pre_hook(lambda own, _: seen.append(own.state_dict()["shampoo"]["steps"]))
    again[1].register_load_state_dict_post_hook(lambda _: seen.append(state_of(again[1])))
    again[1].register_load_state_dict_post_hook(lambda own: own.state[again[0].used].update(count=1), prepend=True)
    saved = run[1].state_dict()
    again[1].load_state_dict(through_a_file(saved))
    assert seen[:2] == [["param_groups", "shampoo", "state"], {}] and same_bits(seen[2], expected)
    assert set(again[1].state[again[0].used]) == {"step", "z", "count"}
    again[1].load_state_dict(made()[1].state_dict())
    assert list(again[1].state.values()) == [{"count": 1}]  # as in torch, a load replaces what there was


@pytest.mark.parametrize("moment", ["fresh with gradients", "trained", "loaded"])
def test_a_flattened_dict_is_taken_though_no_template_was_asked_for(moment: str) -> None:
    flat, run, again = StateDictOptions(flatten_optimizer_state_dict=True), made(), made()
    steps(run, range(4))
    state = get_optimizer_state_dict(*run, options=flat)
    if moment == "loaded":
        again[1].load_state_dict(through_a_file(run[1].state_dict()))
    elif moment == "trained":
        steps(again, range(50, 53))
    else:
        again[0].used.grad = torch.ones(12, 10)
    set_optimizer_state_dict(*again, state, options=flat)
    again[0].load_state_dict(run[0].state_dict())
    for trained in (run, again):
        steps(trained, range(4, 7))
    assert same_bits(snapshot(run[0].parameters()), snapshot(again[0].parameters()))


Schedule = Callable[[torch.optim.Optimizer, int], lr_scheduler.LRScheduler]


def sequential(optimizer: torch.optim.Optimizer, last: int) -> lr_scheduler.LRScheduler:
    parts = [lr_scheduler.ConstantLR(optimizer, 0.1, 3), lr_scheduler.ExponentialLR(optimizer, 0.5)]
    return lr_scheduler.SequentialLR(optimizer, parts, [2], last)


def plateau(optimizer: torch.optim.Optimizer, _: int) -> Any:
    return lr_scheduler.ReduceLROnPlateau(optimizer, "min", 0.5, patience=0)


SCHEDULES: dict[str, Schedule] = {
    "lambda": lambda o, last: lr_scheduler.LambdaLR(o, lambda n: 0.5**n, last),
    "cosine": lambda o, last: lr_scheduler.CosineAnnealingLR(o, 9, last_epoch=last),
    "one_cycle": lambda o, last: lr_scheduler.OneCycleLR(o, 0.1, 9, last_epoch=last),
    "cyclic": lambda o, last: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=True, last_epoch=last),
    "sequential": sequential,
    "plateau": plateau,
}


def scheduled(model: nn.Module, tensor_lr: bool = False) -> Shampoo:
    decays = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim < 2]
    rates = [torch.tensor(rate) if tensor_lr else rate for rate in (0.02, 0.01)]
    return shampoo([{"params": decays, "lr": rates[0]}, {"params": rest, "lr": rates[1], "weight_decay": 0.0}])


@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("way", ["anew", "restored"])
@pytest.mark.parametrize("name", list(SCHEDULES))
def test_a_schedule_goes_on_after_load_shampoo_as_after_load_state_dict(name: str, way: str, tensor_lr: bool) -> None:
    """The scheduler is built after the load, at the epoch reached, or before it, with its own state loaded too."""
    model = made()[0]
    first = scheduled(model, tensor_lr)
    schedule = SCHEDULES[name](first, -1)
    advance(model, first, schedule, 4)
    rates: list[list[list[Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_shampoo(first, folder)
        for by_files in (True, False):
            again = copy.deepcopy(model)
            second = scheduled(again, tensor_lr)
            own = None if way == "anew" else SCHEDULES[name](second, -1)
            if by_files:
                load_shampoo(second, folder)
            else:
                second.load_state_dict(through_a_file(first.state_dict()))
            if own is None:
                own = SCHEDULES[name](second, -1 if name in ("sequential", "plateau") else schedule.last_epoch)
            else:
                own.load_state_dict(copy.deepcopy(schedule.state_dict()))
            rates.append(advance(again, second, own, 3))
    assert rates[0] == rates[1]
    if way == "restored":
        assert rates[0] == advance(model, first, schedule, 3)


def advance(model: nn.Module, optimizer: Shampoo, schedule: Any, count: int) -> list[list[Any]]:
    """Take steps, and return the rates, betas and weights on the way."""
    seen = []
    for step in range(count):
        for number, p in enumerate(model.parameters()):
            p.grad = made_up(p, step, number)
        optimizer.step()
        schedule.step(*[1.0] * isinstance(schedule, lr_scheduler.ReduceLROnPlateau))
        found = [(float(g["lr"]), g["betas"], g["momentum"]) for g in optimizer.param_groups]
        seen.append([found, [p.sum().item() for p in model.parameters()]])
    return seen


def test_what_users_keep_in_groups_comes_back() -> None:
    run, again = made(), made()
    kept = {"stage": "warm", "phase": 3, "cap": np.float32(0.5), "bounds": [0.0, 1.0], "flags": {"a": True}, "no": None}
    run[1].param_groups[0].update(kept, initial_lr=0.25, callback=print, name="mine", span=(1, 2))
    again[1].param_groups[0].update(name="other", span=(0, 0))
    with tempfile.TemporaryDirectory() as folder:
        save_shampoo(run[1], folder)
        load_shampoo(again[1], folder, options=False)
        assert "stage" not in again[1].param_groups[0]
        load_shampoo(again[1], folder)
    group = again[1].param_groups[0]
    assert {name: group[name] for name in kept} == kept and group["initial_lr"] == 0.25
    assert (group["name"], group["span"]) == ("other", (1, 2)) and "callback" not in group


def test_groups_that_were_several_and_differ_keep_their_own(caplog: pytest.LogCaptureFixture) -> None:
    model = made()[0]
    run = scheduled(model)
    for group, value in zip(run.param_groups, (0.5, 0.25), strict=True):
        group.update(initial_lr=value, shared=1)
    named = dict(zip([e.parameter.key for e in run.entries], [e.reference() for e in run.entries], strict=True))
    again = shampoo(list(named.items()))
    with tempfile.TemporaryDirectory() as folder:
        save_shampoo(run, folder)
        load_shampoo(again, folder)
    assert again.param_groups[0]["shared"] == 1 and "initial_lr" not in again.param_groups[0]
    assert "keeps its own initial_lr: its parameters were in the groups 0, 1" in caplog.text


def test_a_state_dict_in_bytes_has_no_more_than_builtins_and_tensors() -> None:
    """A way out right after torch's helpers gives the same dict as before."""
    run = made()
    steps(run, range(4))
    moved = by_helpers()(run)
    file = io.BytesIO()
    torch.save(moved[1].state_dict(), file)
    file.seek(0)
    assert same_bits(torch.load(file, weights_only=True)["shampoo"], run[1].state_dict()["shampoo"])
