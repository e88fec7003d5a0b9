"""What training stacks do to an optimizer, with their own signatures; `make test-stacks` runs the stacks themselves."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader

from shampoo_deepspeed import Shampoo
from tests.support.snippets import STACKS, blocks, run_stack_block
from tests.support.stack_runs import assert_learned, assert_recognised, batches, trained
from tests.support.trainings import make_model

TESTS = Path(__file__).parents[1]
TOKENS, HEAD = "embed_tokens.weight", "lm_head.weight"
OPTIONS: dict[str, Any] = {"lr": 3e-3, "weight_decay": 0.1}


def titan_groups(model: nn.Module) -> list[dict[str, Any]]:
    names, params = zip(*model.named_parameters(), strict=True)
    return [{"params": list(params), "param_names": list(names), "fused": False, "foreach": True, **OPTIONS}]


NOT_FOREACH: dict[str, Any] = {"foreach": False}
FUSED: dict[str, Any] = {"fused": True}
# How each builds an optimizer from a model, as of the versions on the page.
BUILDS: dict[str, Callable[[nn.Module], Shampoo]] = {
    "torchtune": lambda model: Shampoo(model.parameters(), **OPTIONS),
    "verl": lambda model: Shampoo(model.parameters(), **OPTIONS, betas=[0.9, 0.95]),
    "nemo-automodel": lambda model: Shampoo(params=list(model.parameters()), **NOT_FOREACH, **OPTIONS),
    "torchtitan": lambda model: Shampoo(titan_groups(model)),
    "nanoGPT": lambda model: Shampoo(decay_groups(model), lr=3e-3, betas=(0.9, 0.95), **FUSED),
    "lightning": lambda model: Shampoo(nn.ModuleDict({"model": model}).parameters(), **OPTIONS),
}


def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]


@pytest.mark.parametrize("stack", BUILDS)
def test_the_way_in_which_a_stack_builds_it_recognises_parameters(stack: str) -> None:
    model = make_model("llama")
    optimizer = BUILDS[stack](model)
    assert_recognised(optimizer, TOKENS, HEAD)
    assert_learned(trained(model, optimizer, batches(6)))


def plain_loop(model: nn.Module, steps: int, losses: list[float]) -> dict[str, Any]:
    names = {"device": "cpu", "backend": "eager", "batches": batches(steps), "losses": losses}
    return run_stack_block("plain-loop", model=model, **names)


def test_a_plain_loop_with_compile_and_a_gradient_scaler_trains_and_continues() -> None:
    losses: list[float] = []
    made = plain_loop(make_model("llama"), 6, losses)
    assert_recognised(made["optimizer"], TOKENS, HEAD)
    assert made["scaler"].get_scale() > 1.0 and made["optimizer"].metrics()["rejected_steps"] == 0
    assert_learned(losses)
    saved = {key: copy.deepcopy(made[key].state_dict()) for key in ("model", "optimizer", "scaler")}
    fresh = plain_loop(make_model("llama"), 0, [])
    for key, state in saved.items():
        fresh[key].load_state_dict(state)
    tails: list[list[float]] = []
    for one in (made, fresh):
        tails.append(trained(one["model"], one["optimizer"], batches(4)))
    assert tails[0] == tails[1]


@pytest.fixture
def accelerate_ends() -> Any:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_accelerate_s_accumulation_and_schedule_apply(accelerate_ends: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    losses: list[float] = []
    loader: DataLoader[Any] = DataLoader(batches(12), batch_size=None)  # type: ignore[arg-type]
    model = make_model("llama")
    made = run_stack_block("accelerate-loop", torch=torch, model=model, loader=loader, losses=losses)
    inner = assert_recognised(made["optimizer"], TOKENS, HEAD)
    assert {int(steps) for unit in inner.units for steps in unit.steps} == {6}, "each step takes two batches"
    assert_learned(losses)
    assert all(first == second for first, second in zip(losses[::2], losses[1::2], strict=True))
    assert inner.param_groups[0]["lr"] == pytest.approx(3e-4)


def test_a_frozen_base_of_packed_integers_is_not_touched() -> None:
    """As with 4-bit weights: uint8 parameters that require no gradient, under LoRA's adapters."""
    model: Any = get_peft_model(make_model("llama"), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    packed = nn.Parameter(torch.randint(0, 255, (64, 8), dtype=torch.uint8), requires_grad=False)
    model.base_model.model.model.layers[0].register_parameter("packed", packed)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Shampoo(model.parameters(), lr=0.2)
    losses = trained(model, optimizer, batches())
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name for name in moved)
    assert {name for name, policy in optimizer.policies.items() if policy.preconditioned} >= moved
    assert_learned(losses, 0.01)
    named = Shampoo(((n, p) for n, p in model.named_parameters() if p.requires_grad), lr=0.2)
    assert set(named.policies) == moved


def test_every_block_of_the_page_is_run_by_a_test() -> None:
    shown = [block.name for block in blocks([STACKS])]
    assert all(shown) and len(set(shown)) == len(shown) > 12
    texts: set[str] = set()
    for file in (
        file for folder in ("stacks", "integrations", "distributed") for file in (TESTS / folder).glob("*.py")
    ):
        tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        texts |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert set(shown) <= texts


def test_every_row_of_the_page_has_a_section() -> None:
    text = (TESTS.parent / STACKS).read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) >= 13 and all("](#" in row and row.count("|") == 5 for row in rows)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == len(rows) + 1 and all(one != other for one, other in pairwise(headings))
