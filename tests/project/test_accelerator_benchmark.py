"""The GPU benchmark, in a tiny form on the CPU, and the plain loop that it compares with."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import accelerator
from benchmarks.accelerator import Setting, batch, build, measure, on_meta, parameter_groups
from benchmarks.contestants import Contestant, adamw, ours
from benchmarks.plain_loop import PlainLoop
from shampoo_deepspeed import Shampoo
from tests.support.bare import BARE
from tests.support.comparing import deviation

pytestmark = pytest.mark.slow

TINY = Setting("tiny", tokens=32, length=16, frequency=2, rounds=1, device=torch.device("cpu"))


class Watcher(torch.optim.Optimizer):
    """Records what it gets at each step, and changes nothing."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 1.0})
        self.gradients: list[Tensor] = []
        self.autocast: list[bool] = []

    def step(self) -> None:  # type: ignore[override]
        self.gradients += [p.grad.clone() for group in self.param_groups for p in group["params"]]
        self.autocast.append(torch.is_autocast_enabled("cpu"))


def watched(contestant: Contestant, seen: list[Watcher]) -> Contestant:
    def build_both(model: nn.Module) -> list[torch.optim.Optimizer]:
        seen.append(Watcher(model))
        return [seen[-1], *contestant.build(model)]

    return replace(contestant, build=build_both)


def test_a_tiny_run_has_a_row_for_each_contestant_and_profiles_of_ours(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--size", "tiny", "--block", "32", "64", "--tokens", "32", "--sequence-length", "16"]
    accelerator.main([*small, "--frequency", "2", "--rounds", "1", "--device", "cpu", "--profile", str(tmp_path)])
    text = capsys.readouterr().out
    mine = [f"shampoo, {s}, block {b}" for b in (32, 64) for s in ("eigh", "coupled_newton")]
    names = ["torch AdamW, fused", *mine, "soap, block 32", "plain loop over blocks, eigh, block 32"]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == names
    assert rows[0][-1] == "whole over AdamW's" and rows[1][-1] == "+0.0%"  # no column of the device's memory
    assert len(list(tmp_path.iterdir())) == 2 * (len(mine) + 1)
    decompose = [
        "linalg_eigh" in (tmp_path / f"tiny_shampoo_eigh_block_32_{kind}_refresh.txt").read_text()
        for kind in ("with", "without")
    ]
    assert decompose == [True, False]


def test_all_contestants_get_the_same_gradients_and_step_outside_of_autocast() -> None:
    seen: list[Watcher] = []
    for contestant in (adamw(fused=True), ours("shampoo", "staggered", 16, 2), accelerator.plain_loop(16, 2)):
        measure(watched(contestant, seen), TINY)
    assert len(seen[0].gradients) == 6 * len(list(on_meta(TINY).parameters()))
    for other in seen[1:]:
        assert all(map(torch.equal, seen[0].gradients, other.gradients))
    assert not any(flag for watcher in seen for flag in watcher.autocast)


def test_recomputed_activations_give_the_same_gradients() -> None:
    seen: list[Watcher] = []
    for setting in (TINY, replace(TINY, recompute=True)):
        measure(watched(adamw(fused=True), seen), setting)
    assert all(map(torch.equal, seen[0].gradients, seen[1].gradients))


def test_nothing_of_a_contestant_outlives_it_and_one_that_does_not_fit_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[weakref.ref[nn.Parameter]] = []

    def noted(contestant: Contestant) -> Contestant:
        def build_noted(model: nn.Module) -> list[torch.optim.Optimizer]:
            assert all(reference() is None for reference in built)  # earlier ones have been freed
            built.extend(weakref.ref(p) for p in model.parameters())
            return contestant.build(model)

        return replace(contestant, build=build_noted)

    def full(model: nn.Module) -> list[torch.optim.Optimizer]:
        raise torch.OutOfMemoryError("as the device would say")

    everyone = [adamw(fused=True), ours("shampoo", "staggered", 16, 2), Contestant("too large", full)]
    everyone.append(ours("soap", "staggered", 16, 2))
    monkeypatch.setattr(accelerator, "contestants", lambda *_: ([noted(c) for c in everyone], set()))
    found = accelerator.run([16], ["eigh"], TINY)
    assert list(found) == ["torch AdamW, fused", "shampoo, staggered", "soap, staggered"]
    assert "too large: does not fit" in capsys.readouterr().out
    gc.collect()
    assert len(built) == 4 * len(list(on_meta(TINY).parameters())) and not any(reference() for reference in built)


@pytest.mark.parametrize("size, parameters", [("350m", 350e6), ("1b", 1e9)])
def test_models_have_the_size_that_they_are_named_after(size: str, parameters: float) -> None:
    model = on_meta(replace(TINY, size=size))
    assert abs(sum(p.numel() for p in model.parameters()) / parameters - 1.0) <= 0.1


def test_models_and_gradients_are_in_float32() -> None:
    model = build(TINY)
    accelerator.one_pass(model, batch(TINY, 0))
    assert {(p.dtype, p.grad.dtype) for p in model.parameters() if p.grad is not None} == {(torch.float32,) * 2}


def test_the_plain_loop_is_our_rule_with_all_refreshes_at_one_step() -> None:
    """In float64, rounding hides no mistakes; blocks of 16 divide 32 evenly and 88 unevenly."""
    ridges = {"epsilon": 1e-12, "relative_epsilon": 1e-6}
    options: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1, **ridges}
    left = build(TINY).double()
    right = copy.deepcopy(left)
    plain = PlainLoop(parameter_groups(left), block=16, frequency=10, **options)
    wide: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64", "solver": "eigh"}
    own = {**BARE, **options, **wide, "refresh": "sync", "max_preconditioner_dim": 16, "precondition_frequency": 10}
    batched = Shampoo(right.named_parameters(), model=right, **own)
    before = [p.detach().clone() for p in left.parameters()]
    for step in range(25):
        tokens = batch(TINY, step)
        for model, optimizer in ((left, plain), (right, batched)):
            model.zero_grad()
            model(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
    roots = [len(b.roots) for state in plain.state.values() for b in state["blocks"] if b.factors]
    assert len(roots) == 2 * (4 * 4 + 3 * 12) and set(roots) == {2}
    for p, q, start in zip(left.parameters(), right.parameters(), before, strict=True):
        assert deviation(p.detach() - start, q.detach() - start) <= 1e-9


def test_tokens_must_fill_whole_sequences(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        accelerator.main(["--size", "tiny", "--tokens", "100", "--sequence-length", "16"])
    assert "--tokens 100 is not a multiple of --sequence-length 16" in capsys.readouterr().err
