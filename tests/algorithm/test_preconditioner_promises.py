"""Promises of Shampoo, SOAP and KL-Shampoo beyond their formulas: invariances, moderate first steps, robustness."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.preconditioners import build
from shampoo_deepspeed.options.choices import PRECONDITIONERS
from shampoo_deepspeed.options.family import FAMILY
from tests.support.bare import BARE
from tests.support.stepping import drive, made_up, parameter, refresh, same_bits, shampoo, snapshot
from tests.support.zoo import relative_error

pytestmark = pytest.mark.slow

F64 = torch.float64
WITH_FACTORS = [name for name, parts in FAMILY.items() if parts.statistics]
FLOAT64: dict[str, Any] = {"factor_dtype": "float64", "root_dtype": "float64"}
NO_EPSILON: dict[str, Any] = {"eps": 0.0, "epsilon": 0.0, "relative_epsilon": 0.0, "early_relative_epsilon": 0.0}
ACCEPTED = None
TEXT = Path(__file__).parents[2] / "README.md"


def moves(gradients: list[Tensor], **options: Any) -> list[Tensor]:
    """Return the updates of one parameter's steps."""
    p = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    optimizer = Shampoo([p], lr=1.0, **({} if p.dtype == torch.float32 else FLOAT64), **options)
    found = []
    for g in gradients:
        before = p.detach().clone()
        p.grad = g.clone()
        optimizer.step()
        found.append(before - p.detach())
    return found


def drawn(*shape: int, steps: int = 8) -> list[Tensor]:
    like = torch.empty(shape, dtype=F64)
    return [made_up(like, step) for step in range(steps)]


def orthogonal(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed)))[0]


@pytest.mark.parametrize("options", [{}, {"exponent_override": 4.0}, {"eps": 0.1, "relative_epsilon": 0.1}], ids=str)
def test_signs_and_order_of_eigenvectors_do_not_matter_between_soaps_refreshes(options: dict[str, Any]) -> None:
    preconditioner = build(ShampooConfig(preconditioner="soap", **FLOAT64, **options))
    shape = (3, 5, 4)
    state = preconditioner.new_state(2, shape, torch.device("cpu"), F64)
    for step in range(1, 7):
        g = made_up(torch.empty(2, *shape, dtype=F64), step)
        preconditioner.accumulate(state, g, step, ACCEPTED)
        if step in (3, 6):
            assert refresh(preconditioner, state, step, g) == []
        if step >= 3:
            seen = preconditioner.project(state, g)
            preconditioner.apply(state, seen, seen, ACCEPTED)
    other = {name: tensor.clone() for name, tensor in state.items()}
    for mode, d in enumerate(shape):
        order = torch.randperm(d, generator=torch.Generator().manual_seed(mode))
        signs = torch.tensor([-1.0, 1.0, -1.0, -1.0, 1.0], dtype=F64)[:d]
        other[f"basis_{mode}"] = other[f"basis_{mode}"][:, :, order] * signs
        other["rotated_second_moment"] = other["rotated_second_moment"].index_select(mode + 1, order)
    for step in range(7, 12):
        g, m = (made_up(torch.empty(2, *shape, dtype=F64), step, salt) for salt in (0, 1))
        updates = [
            preconditioner.apply(kept, preconditioner.project(kept, g), preconditioner.project(kept, m), ACCEPTED)
            for kept in (state, other)
        ]
        assert relative_error(updates[1], updates[0]) < 1e-12


@pytest.mark.parametrize("preconditioner", ["shampoo", "kl_shampoo"])
@pytest.mark.parametrize("grafting", [{"grafting": "none", "elementwise": "sgd"}, {"grafting": "sgd"}], ids=str)
@pytest.mark.parametrize("kept", [{}, {"refresh_tolerance": 0.3}], ids=str)
def test_an_orthogonal_change_of_basis_changes_the_update_by_the_same(
    kept: dict[str, Any], grafting: dict[str, Any], preconditioner: str
) -> None:
    left, right, gradients = orthogonal(6, 1), orthogonal(4, 2), drawn(6, 4)
    options = {"precondition_frequency": 2, "preconditioner": preconditioner, **grafting, **kept}
    turned = moves([left @ g @ right for g in gradients], **options)
    for found, expected in zip(turned, moves(gradients, **options), strict=True):
        assert relative_error(found, left @ expected @ right) < 1e-9


def test_soap_updates_rotate_with_the_gradients() -> None:
    """This holds from the first refresh on; the element-wise update before it depends on the coordinates."""
    left, right, gradients = orthogonal(6, 1), orthogonal(4, 2), drawn(6, 4)
    options = {"precondition_frequency": 2, "preconditioner": "soap", "elementwise": "sgd"}
    turned = moves([left @ g @ right for g in gradients], **options)
    for found, expected in zip(turned[:2], moves(gradients, **options)[:2], strict=True):
        assert relative_error(found, left @ expected @ right) < 1e-9


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1e3, 1e6])
@pytest.mark.parametrize("grafting", [None, "adam", "rms"])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_without_absolute_epsilons_the_scale_of_gradients_does_not_matter(
    preconditioner: str, grafting: str | None, scale: float
) -> None:
    options = {"preconditioner": preconditioner, "precondition_frequency": 3, "epsilon": 0.0, "eps": 0.0}
    options |= {"grafting": grafting, "normalize_gradients": False}
    gradients = drawn(6, 4, steps=13)
    scaled = moves([scale * g for g in gradients], **options)
    for found, expected in zip(scaled, moves(gradients, **options), strict=True):
        assert relative_error(found, expected) < 1e-9


def test_ungrafted_kl_shampoo_has_the_scale_of_its_own_whitened_gradient() -> None:
    """Its S^(-1/2) cancels the gradient's scale, which Shampoo's exponents need not do."""
    options = {"preconditioner": "kl_shampoo", "precondition_frequency": 3, "epsilon": 0.0, "grafting": "none"}
    options["normalize_gradients"] = False
    gradients = drawn(6, 4, steps=13)
    scaled = moves([1e4 * g for g in gradients], elementwise="adam", eps=0.0, **options)
    for found, expected in zip(scaled, moves(gradients, elementwise="adam", eps=0.0, **options), strict=True):
        assert relative_error(found, expected) < 1e-9


def test_kl_shampoo_finds_the_covariance_of_kronecker_gradients() -> None:
    """G = A^(1/2) Z B^(1/2) has E[gg'] = A (x) B. S_a (x) S_b converges to it, including scale; Shampoo's does not."""
    no_ridge = {"relative_epsilon": 0.0, "early_relative_epsilon": 0.0}
    config = ShampooConfig.from_options({"factor_beta": 0.99, "statistics_frequency": 1, **no_ridge, **FLOAT64})
    preconditioner = build(config)
    left, right = orthogonal(5, 3), orthogonal(3, 4)
    a = left @ torch.diag(torch.tensor([9.0, 4.0, 1.0, 0.25, 0.04], dtype=F64)) @ left.T
    b = right @ torch.diag(torch.tensor([5.0, 1.0, 0.1], dtype=F64)) @ right.T
    roots = [torch.linalg.cholesky(m) for m in (a, b)]
    state = preconditioner.new_state(1, (5, 3), torch.device("cpu"), F64)
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 3001):
        g = roots[0] @ torch.randn(1, 5, 3, generator=generator, dtype=F64) @ roots[1].T
        preconditioner.accumulate(state, g, step, ACCEPTED)
        if step % 10 == 0:
            assert refresh(preconditioner, state, step, g) == []
    product = state["scale"] * torch.kron(state["root_0"][0], state["root_1"][0])
    whitened = product @ torch.kron(a, b) @ product.T
    assert (torch.linalg.eigvalsh(whitened) - 1.0).abs().max() < 0.35


def gradients_of(kind: str, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    random = [torch.randn(8, 6, generator=generator, dtype=F64) for _ in range(12)]
    if kind == "zero":
        found = [random[0], *[torch.zeros(8, 6)] * 11]
    elif kind == "rank_one":
        found = [g[:, :1] @ g[:1] for g in random]
    elif kind == "one_rank_one":
        found = [random[0][:, :1] @ random[0][:1]] * 12
    else:  # an exact null direction of the left factor, as in layers whose output goes into a LayerNorm
        found = [g - g.mean(0, keepdim=True) for g in random]
    return [g.to(dtype) for g in found]


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize(
    "options", [{}, NO_EPSILON, BARE, BARE | NO_EPSILON], ids=["default", "zero", "bare", "bare_zero"]
)
@pytest.mark.parametrize("kind", ["zero", "rank_one", "one_rank_one", "null_update"])
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_degenerate_gradients_give_finite_steps_and_with_the_default_epsilons_calm_ones(
    preconditioner: str, kind: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    for frequency in (1, 3):
        for scale in (1e-8, 1.0, 1e6):
            steps = moves(
                [scale * g for g in gradients_of(kind, dtype)],
                **(options | {"preconditioner": preconditioner, "precondition_frequency": frequency}),
            )
            for step in steps:
                assert torch.isfinite(step).all()
                assert "eps" in options or step.square().mean().sqrt() <= 3.0


def test_soap_leaves_an_exactly_null_update_alone() -> None:
    """In float32 there is only rounding noise, and the relative part of eps prevents a step from it."""
    gradients = [1e3 * g for g in gradients_of("null_update", torch.float32)]
    for step in moves(gradients, preconditioner="soap", precondition_frequency=3)[2:]:
        assert step.mean(0).abs().max() < 0.15 * step.square().mean().sqrt()


def batches(steps: int) -> list[Tensor]:
    data = torch.tensor(list(TEXT.read_bytes()))
    generator = torch.Generator().manual_seed(5)
    starts = torch.randint(len(data) - 32, (steps, 2), generator=generator)
    return [torch.stack([data[s : s + 32] for s in row]).long() for row in starts]


PACES = [*((f, "staggered") for f in (1, 2, 5, 20)), (10, "sync"), (10, "background")]


RECIPES: dict[str, dict[str, Any]] = {"default": {}, "bare": BARE}


def longest_steps(model: LlamaForCausalLM, options: dict[str, Any]) -> dict[str, float]:
    """Return how far parameters may move in a step, relative to lr: 3, or 0.4 if that is the length of all updates.

    Embeddings have a factor of their own. Weights near 1 are rounded to 1e-5 of a step, hence the last factor.
    """
    config = ShampooConfig.from_options(options)
    own = 0.4 if config.grafting_method == "rms" else 3.0
    limits = {name: own if name.endswith("_proj.weight") else 3.0 for name, _ in model.named_parameters()}
    limits["model.embed_tokens.weight"] = max(3.0, config.embedding_lr or 0.0)
    return {name: limit * (1.0 + 1e-4) for name, limit in limits.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("frequency", "refresh"), PACES)
@pytest.mark.parametrize("recipe", list(RECIPES))
@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_the_first_steps_are_moderate(preconditioner: str, recipe: str, frequency: int, refresh: str) -> None:
    """No parameter of a small Llama on real text moves by more than 3 lr RMS in any of the first 50 steps.

    Only embeddings do if they have a larger factor, which then bounds their steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=256, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2
            )
        )
    lr = 3e-3
    options = RECIPES[recipe] | {"preconditioner": preconditioner, "precondition_frequency": frequency}
    options["refresh"] = refresh
    optimizer, longest = Shampoo(model.named_parameters(), lr=lr, model=model, **options), longest_steps(model, options)
    losses = []
    for tokens in batches(50):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        before = snapshot(model.parameters())
        optimizer.step()
        for (name, p), old in zip(model.named_parameters(), before, strict=True):
            assert (p.detach() - old).square().mean().sqrt() <= longest[name] * lr, name
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.75 * sum(losses[:5])


@pytest.mark.parametrize("spoiled", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"refresh_tolerance": 0.01}], ids=str)
@pytest.mark.parametrize("preconditioner", WITH_FACTORS)
def test_a_block_whose_refresh_fails_keeps_all_that_is_applied(
    preconditioner: str, options: dict[str, Any], spoiled: float
) -> None:
    """The other block of the stack is refreshed. A failure before the first refresh leaves no state."""
    made = build(ShampooConfig(preconditioner=preconditioner, **options))
    state = made.new_state(2, (4, 3), torch.device("cpu"), torch.float32)
    found_inf = None
    for step in range(1, 5):
        g = made_up(torch.empty(2, 4, 3), step)
        made.accumulate(state, g, step, found_inf)
        before = {name: tensor.clone() for name, tensor in state.items()}
        if step in (1, 4):
            state["factor_1"][0] = spoiled
        assert refresh(made, state, step, g) == ([0] if step in (1, 4) else [])
        changed = {name for name, tensor in state.items() if not torch.equal(tensor[0], before[name][0])}
        assert changed <= {"factor_1"} if step in (1, 4) else changed
        assert any(not torch.equal(tensor[1], before[name][1]) for name, tensor in state.items())
        state["factor_1"].copy_(before["factor_1"])
        seen = made.project(state, g)
        assert torch.isfinite(made.apply(state, seen, seen, found_inf)).all()


@pytest.mark.parametrize("preconditioner", ["soap", "kl_shampoo"])
def test_failed_refreshes_are_reported_and_training_goes_on(
    preconditioner: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    p = parameter(6, 6)
    optimizer = shampoo([("w", p)], preconditioner=preconditioner, precondition_frequency=2)

    def refuse(*_: Any) -> Any:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        drive(optimizer, [p], range(2))
    what = "eigenbasis" if preconditioner == "soap" else "inverse root"
    assert [r.getMessage().split(":")[0] for r in caplog.records] == [f"no new {what} for block w/0"]
    monkeypatch.undo()
    drive(optimizer, [p], range(2, 6))
    (stack,) = optimizer.state_dict()["shampoo"]["stacks"]
    assert (stack["refreshed"], stack["failures"]) == ([True], [0])
    assert torch.isfinite(p).all()


@pytest.mark.parametrize("preconditioner", WITH_FACTORS)
def test_a_tolerance_saves_decompositions_and_each_block_decides_by_its_own_factors(
    preconditioner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One parameter's gradients keep their eigenbasis, the other's rotate; both are in one stack."""
    spent: list[int] = []
    for name in ("eigh", "qr"):
        original = getattr(torch.linalg, name)

        def counted(stack: Tensor, original: Any = original) -> Any:
            spent.append(1)
            return original(stack)

        monkeypatch.setattr(torch.linalg, name, counted)
    options = {"preconditioner": preconditioner, "precondition_frequency": 1, "refresh_tolerance": 0.05}
    options["start_preconditioning_step"] = 1
    still, rotating = parameter(4, 4), parameter(4, 4)
    alone = parameter(4, 4)
    optimizer, twin = shampoo([still, rotating], **options), shampoo([alone], **options)
    diagonal = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    counts = []
    for step in range(6):
        rotation = torch.linalg.matrix_exp(0.5 * step * (torch.ones(4, 4).triu() - torch.ones(4, 4).tril()))
        still.grad, rotating.grad = (1.0 + step) * diagonal, rotation @ diagonal @ rotation.T
        alone.grad = still.grad.clone()
        spent.clear()
        optimizer.step()
        counts.append(sum(spent))
        twin.step()
    assert counts[0] == 4  # both modes of both
    assert all(count <= 2 for count in counts[1:]) and sum(counts[1:]) > 0
    assert relative_error(still.detach() - parameter(4, 4).detach(), alone.detach() - parameter(4, 4).detach()) < 1e-5


def test_a_tolerance_that_is_never_passed_freezes_soaps_first_basis() -> None:
    p = parameter(6, 4)
    optimizer = shampoo([p], preconditioner="soap", refresh_tolerance=0.999, precondition_frequency=2)
    drive(optimizer, [p], range(2))
    (stack,) = optimizer.state_dict()["shampoo"]["stacks"]
    before = [stack["tensors"][f"basis_{mode}"].clone() for mode in (0, 1)]
    drive(optimizer, [p], range(2, 8))
    assert same_bits([stack["tensors"][f"basis_{mode}"] for mode in (0, 1)], before)
