"""Parameters that the model has replaced since the optimizer was built are an error at the first step, never silent."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from shampoo_deepspeed import LayoutError, Shampoo
from shampoo_deepspeed.engine import parameter_registry
from tests.support.stack_runs import batches, trained
from tests.support.trainings import make_model

LINE = r"build the optimizer from the model as it is now: optimizer = Shampoo\(model.named_parameters\(\), ...\)"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)
        self.aside = nn.Linear(8, 4)

    def forward(self, rows: Tensor) -> Tensor:
        out: Tensor = self.last(torch.tanh(self.first(rows)))
        return out


def step(model: nn.Module, optimizer: Shampoo) -> None:
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()


def assigned(model: nn.Module) -> None:
    model.load_state_dict({name: p.detach().clone() for name, p in model.state_dict().items()}, assign=True)


def converted(model: nn.Module) -> None:
    """As FSDP2's fully_shard does, and conversions that make new parameters."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().to(torch.bfloat16).float()))


def emptied(model: nn.Module) -> None:
    """As FSDP1 does with whole parameters, which become views of one flat parameter."""
    for module in list(model.modules()):
        for name, p in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            setattr(module, name, p.detach())
    model.register_parameter("flat", nn.Parameter(torch.ones(3)))


def with_a_new_head(model: Any) -> None:
    model.last = nn.Linear(8, 4)


ALL: list[Callable[[nn.Module], None]] = [assigned, converted]


@pytest.mark.parametrize("change", ALL, ids=lambda change: change.__name__)
def test_a_model_that_has_replaced_all_parameters_is_an_error(change: Callable[[nn.Module], None]) -> None:
    model = Small()
    optimizer = Shampoo(model.parameters())
    change(model)
    with pytest.raises(LayoutError, match=f"^6 of the optimizer's 6 parameters .*first.weight, .*{LINE}"):
        step(model, optimizer)


def test_so_is_one_whose_parameters_have_other_names_now() -> None:
    model = Small()
    optimizer = Shampoo(model.parameters(), model=model)
    emptied(model)
    with pytest.raises(LayoutError, match="6 of the optimizer's 6 parameters are no longer the model's"):
        optimizer.step()


def test_a_new_layer_of_the_same_name_is_an_error() -> None:
    model = Small()
    optimizer = Shampoo(model.named_parameters(), model=model)
    with_a_new_head(model)
    with pytest.raises(LayoutError, match=rf"^2 of the optimizer's 6 parameters .*\(last.weight, last.bias\).*{LINE}"):
        step(model, optimizer)


RESIZED = {
    "llama": r"^1 of the optimizer's 35 parameters .*\(lm_head.weight\)",
    "tied_llama": r"^model.embed_tokens.weight has the shape \(160, 32\) and had \(128, 32\) when",
}


@pytest.mark.parametrize("kind", RESIZED)
def test_resized_embeddings_are_an_error(kind: str) -> None:
    """The usual mistake with new tokens: the head would not be trained, and old blocks would not fit the embedding."""
    model: Any = make_model(kind)
    optimizer = Shampoo(model.parameters())
    model.resize_token_embeddings(160, mean_resizing=False)
    with pytest.raises(LayoutError, match=f"{RESIZED[kind]}.*{LINE}"):
        trained(model, optimizer, batches(1))


def test_the_error_is_raised_at_the_first_step_after_steps_that_did_nothing() -> None:
    model = Small()
    optimizer = Shampoo(model.parameters())
    optimizer.step()
    with_a_new_head(model)
    with pytest.raises(LayoutError, match=r"^2 of"):
        step(model, optimizer)


def unused(model: Any) -> None:
    """Nothing: `aside` has no gradient."""


def removed(model: Any) -> None:
    del model.aside


def frozen(model: Any) -> None:
    model.aside.requires_grad_(False)


def with_a_new_layer(model: Any) -> None:
    model.new = nn.Linear(8, 4)


def wrapped(model: Any) -> None:
    model.first = nn.Sequential(model.first, nn.Identity())


def with_a_frozen_successor(model: Any) -> None:
    """A layer that shall not be trained any more, as the user says."""
    model.aside = nn.Linear(8, 4).requires_grad_(False)


FINE: list[Callable[[Any], None]] = [unused, removed, frozen, with_a_new_layer, wrapped, with_a_frozen_successor]


@pytest.mark.parametrize("change", FINE, ids=lambda change: change.__name__)
def test_what_replaces_no_parameter_that_should_train_is_none(change: Callable[[Any], None]) -> None:
    model = Small()
    optimizer = Shampoo(model.parameters())
    change(model)
    before = model.last.weight.detach().clone()
    for _ in range(2):
        step(model, optimizer)
    assert not torch.equal(model.last.weight, before)


def test_a_part_of_a_model_that_waits_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    """As the second of two optimizers of one model, or that of another model of the same kind."""
    model, twin = Small(), Small()
    for waiting in (Shampoo(model.aside.parameters()), Shampoo(twin.parameters())):
        step(model, waiting)
    assert sum("found no gradient" in message for message in caplog.messages) == 2


def test_parameters_without_a_module_are_no_error() -> None:
    """Functional training: the module that they came from may be gone."""
    model = Small()
    named: dict[str, Tensor] = dict(model.named_parameters())
    optimizer = Shampoo(named.items(), model=model)
    skeleton = Small().to("meta")
    del model
    gc.collect()
    before = named["last.weight"].detach().clone()
    for _ in range(2):
        functional_call(skeleton, named, torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    assert not torch.equal(named["last.weight"], before)


def test_a_wrapper_that_is_gone_is_no_error() -> None:
    """The optimizer took its names from it; the model inside still has the parameters."""
    model = Small()
    optimizer = Shampoo(model.parameters(), model=nn.ModuleDict({"model": model}))
    gc.collect()
    optimizer.step()
    step(model, optimizer)
    assert "model.last.weight" in optimizer.policies


def test_a_model_that_is_gone_is_an_error() -> None:
    """As one that was built a second time after the optimizer."""
    model = Small()
    optimizer = Shampoo(model.parameters())
    model = Small()
    gc.collect()
    with pytest.raises(LayoutError, match=LINE):
        step(model, optimizer)


def test_a_steady_optimizer_with_unused_parameters_searches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, searches = Small(), []
    optimizer = Shampoo(model.parameters())

    def counted(given: Any, *_: Any, **__: Any) -> list[str]:
        searches.append(len(given))
        return []

    monkeypatch.setattr(parameter_registry, "replaced", counted)
    for _ in range(3):
        optimizer.step()
    for _ in range(3):
        step(model, optimizer)
    assert searches == [6, 6]
