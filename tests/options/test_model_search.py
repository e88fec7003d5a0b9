"""The model of parameters that come without names is found, behind wrappers and among other models."""

from __future__ import annotations

import copy
import gc
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.modules import module as torch_module

from shampoo_deepspeed import OptionError, Shampoo
from shampoo_deepspeed.engine import parameter_registry
from shampoo_deepspeed.options.model_search import find_models
from tests.support.stepping import drive, parameter, same_bits, snapshot

ROWS, WIDTH = 40, 12


class Language(nn.Module):
    """A language model whose names say nothing of what its parameters are for."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Embedding(ROWS, WIDTH)
        self.two = nn.Linear(WIDTH, WIDTH)
        self.three = nn.LayerNorm(WIDTH)
        self.four = nn.Linear(WIDTH, ROWS)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.four(self.three(torch.tanh(self.two(self.one(tokens)))))
        return out


class Passing(nn.Module):
    """A wrapper of a user's own."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.module = inside

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


class Empty(nn.ModuleList):
    """A module with parameters of its own, whose truth value is False."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(parameter(ROWS, WIDTH).detach())

    def __len__(self) -> int:
        return 0


def language() -> Language:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        return Language()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def checkpointed(model: Any) -> nn.Module:
    model.two = checkpoint_wrapper(compiled(model.two))
    return nn.DataParallel(model)


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "compiled": compiled,
    "own": Passing,
    "nested": lambda model: compiled(Passing(Passing(compiled(model)))),
    "checkpointed": checkpointed,
}
BUILDS: dict[str, Callable[[nn.Module], dict[str, Any]]] = {
    "names": lambda model: {"params": model.named_parameters()},
    "names and model": lambda model: {"params": model.named_parameters(), "model": model},
    "iterator": lambda model: {"params": model.parameters()},
    "filter": lambda model: {"params": filter(lambda p: p.requires_grad, model.parameters())},
    "list": lambda model: {"params": list(model.parameters())},
    "groups": lambda model: {"params": [{"params": (p for p in model.parameters() if p.requires_grad)}]},
    "named groups": lambda model: {"params": [{"params": list(model.named_parameters())}]},
}


def trained(model: Any, optimizer: Shampoo) -> list[Tensor]:
    for step in range(3):
        optimizer.zero_grad()
        tokens = torch.arange(step, step + 8).remainder(ROWS)
        model(tokens).logsumexp(-1).square().mean().backward()
        optimizer.step()
    return snapshot(model.parameters())


def policies_of(optimizer: Shampoo) -> dict[str, Any]:
    return {e.parameter.key: (e.parameter.kinds, optimizer.policies[e.parameter.key]) for e in optimizer.entries}


@pytest.mark.slow
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_treatment_is_the_same_however_the_optimizer_is_built(wrapper: str) -> None:
    plain = language()
    wanted = Shampoo(plain.named_parameters(), model=plain, no_decay=["kind:norm", "*bias"], weight_decay=0.1)
    weights = trained(plain, wanted)
    assert {name for name, (kinds, _) in policies_of(wanted).items() if "lm_head" in kinds} == {"four.weight"}
    policies = {name: policy for name, (_, policy) in policies_of(wanted).items()}
    assert policies["one.weight"].rate == "embedding_lr" and policies["two.weight"].preconditioned
    for build in BUILDS:
        model = WRAPPERS[wrapper](language())
        optimizer = Shampoo(**BUILDS[build](model), no_decay=["kind:norm", "*bias"], weight_decay=0.1)
        assert policies_of(optimizer) == policies_of(wanted), build
        assert same_bits(trained(model, optimizer), weights), build
        optimizer.load_state_dict(wanted.state_dict())


def test_a_model_whose_truth_value_is_false_is_a_model() -> None:
    model = Empty()
    optimizer = Shampoo([model.table], model=model)
    assert [entry.parameter.name for entry in optimizer.entries] == ["table"]
    assert [entry.parameter.name for entry in Shampoo(model.parameters()).entries] == ["table"]


def test_nothing_is_left_behind() -> None:
    """No hook, and no reference to a model or its parameters, also by an optimizer that is copied."""
    model = language()
    optimizer = Shampoo(model.parameters())
    assert not torch_module._global_forward_pre_hooks
    copied = copy.deepcopy(optimizer)
    assert policies_of(copied) == policies_of(optimizer)
    alive: list[weakref.ref[Any]] = [weakref.ref(model), weakref.ref(model.two.weight)]
    optimizer.param_groups[0]["params"] = []
    del model
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def keys(params: Iterable[Any], **options: Any) -> list[str]:
    return [entry.parameter.key for entry in Shampoo(params, **options).entries]


def test_the_names_are_those_of_the_module_that_was_given() -> None:
    """A model in a larger one has its own names if the other parts are trained by other optimizers."""
    whole = nn.ModuleDict({"student": language(), "teacher": language()})
    part: Any = whole["student"]
    assert keys(part.parameters()) == keys(part.named_parameters()) == [name for name, _ in part.named_parameters()]
    assert keys(whole.parameters())[0] == "student.one.weight"
    whole["teacher"].requires_grad_(False)
    assert keys(part.parameters())[0] == "student.one.weight"  # as in whole.named_parameters()
    assert keys(part.named_parameters())[0] == "one.weight"  # as the user says


def test_a_part_alone_is_treated_as_in_its_model() -> None:
    model = language()
    optimizer = Shampoo(model.four.parameters())
    assert policies_of(optimizer)["weight"][1].reason == "excluded by 'kind:lm_head'"


def test_a_part_of_a_frozen_model_has_the_names_of_the_model() -> None:
    model = language().requires_grad_(False)
    model.two.requires_grad_(True)
    assert keys(p for p in model.parameters() if p.requires_grad) == ["two.weight", "two.bias"]


def test_two_models_share_an_optimizer_and_their_equal_names_stay_apart() -> None:
    first, second, alone = language(), nn.Sequential(nn.Embedding(9, 4)), nn.Linear(3, 4)
    found = Shampoo([*first.parameters(), *second.parameters()])
    assert all(policies_of(found)[name][1].rate == "embedding_lr" for name in ("0.weight", "one.weight"))
    twin = nn.Linear(3, 4)
    assert keys([*alone.parameters(), *twin.parameters()]) == [f"group0.{n}" for n in range(4)]


def test_a_group_that_joins_later_is_treated_alike() -> None:
    model = language()
    optimizer = Shampoo(model.two.parameters(), lr=1e-3)
    optimizer.add_param_group({"params": model.one.parameters()})
    optimizer.add_param_group({"params": list(model.four.parameters())})
    assert optimizer.policies["one.weight"].rate == "embedding_lr"
    assert [p.reason for p in optimizer.policies.values()].count("excluded by 'kind:lm_head'") == 1


@pytest.mark.slow
def test_other_threads_are_not_disturbed() -> None:
    """What they are building, such as tuples that grow, may be held by nobody else."""
    model, failures, stop = language(), list[BaseException](), threading.Event()

    def work() -> None:
        try:
            while not stop.is_set():
                assert len(tuple(number for number in range(300))) == 300
                own = nn.Sequential(nn.Linear(2, 3))
                assert keys(own.parameters())[0] == "0.weight"
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for _ in range(10):
            assert find_models(list(model.parameters())).named_by == (model,)
    finally:
        stop.set()
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    assert not failures


def test_modules_that_are_half_built_are_no_obstacle() -> None:
    half = nn.Linear.__new__(nn.Linear)  # a constructor that builds the optimizer before super().__init__()
    model = language()
    assert find_models(list(model.parameters())).named_by == (model,)
    del half


SHAPES = [(3000, 16), (64, 16), (16, 64), (16,), (3000, 16)]


def test_without_any_model_shapes_may_tell() -> None:
    params = [parameter(*shape) for shape in SHAPES]
    policies = list(Shampoo(params, strict_names=True).policies.values())
    assert [policy.preconditioned for policy in policies] == [False, True, True, False, False]
    assert [policy.rate for policy in policies] == ["embedding_lr", *["elementwise_lr"] * 4]
    tied = list(Shampoo(params[:4]).policies.values())
    assert not tied[0].preconditioned and tied[0].rate == "tied_embedding_lr"


@pytest.mark.parametrize("shapes", [[(3000, 16)], [(3000, 16), (16, 3000)], [(3000, 16), (2000, 16)], [(60, 16)] * 2])
def test_shapes_that_tell_nothing_are_left_alone(shapes: list[tuple[int, ...]]) -> None:
    params = [parameter(*shape) for shape in shapes]
    assert all(policy.preconditioned for policy in Shampoo(params).policies.values())


def test_what_nothing_tells_is_said_once_or_is_an_error(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parameter_registry, "WARNED", [])
    caplog.set_level(logging.WARNING, logger="shampoo_deepspeed")
    matrix = parameter(8, 6)
    before = matrix.detach().clone()
    strict = Shampoo([matrix], strict_names=True)
    for _ in range(2):
        with pytest.raises(OptionError, match="strict_names = True: of the preconditioned parameters 1 have no names"):
            drive(strict, [matrix], range(1))
    assert torch.equal(matrix, before) and not caplog.messages
    drive(Shampoo([matrix]), [matrix], range(3))
    assert len(caplog.messages) == 1
    drive(Shampoo([("matrix", matrix)], strict_names=True), [matrix], range(1))
    model = language()
    drive(Shampoo(model.parameters(), strict_names=True), list(model.parameters()), range(1))
    drive(Shampoo([matrix], strict_names=True, exclude=[]), [matrix], range(1))
