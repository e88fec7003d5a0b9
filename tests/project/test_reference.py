"""The reference itself: a case by hand, torch's own optimizers, closed forms and invariances."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.bare import BARE
from tests.support.reference import Reference, cut, merge
from tests.support.zoo import gradients, make_batch, make_model, relative_error

# Plain Shampoo without any epsilon or grafting, with sums as factors, from the first step on.
SUMS: dict[str, Any] = BARE | {"lr": 1.0, "betas": (0.0, 1.0), "grafting": "none", "precondition_frequency": 1}
SUMS |= {"epsilon": 0.0, "relative_epsilon": 0.0}
del SUMS["embedding_lr"], SUMS["tied_embedding_lr"]  # the reference knows no kinds of parameters
NEVER = 10_000  # a start step that no test reaches, so that all updates are the grafting method's


def run(params: dict[str, Tensor], grads: list[dict[str, Tensor]], **options: Any) -> dict[str, Tensor]:
    reference = Reference(params, **options)
    for g in grads:
        reference.step(g)
    return reference.values()


def random_problem(*shape: int, steps: int = 6) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(3)

    def draw() -> dict[str, Tensor]:
        return {"w": torch.randn(*shape, generator=generator, dtype=torch.float64)}

    return draw(), [draw() for _ in range(steps)]


@pytest.mark.parametrize(
    "shape, limit, expected",
    [
        ((17, 9), 1024, (17, 9)),
        ((4, 4), 1024, (4, 4)),
        ((7, 9, 3), 1024, (7, 27)),
        ((7, 9, 3), 8, (7, 9, 3)),
        ((1, 5), 1024, (5,)),
        ((8, 1, 5), 4, (8, 5)),
        ((2, 3, 4, 5), 20, (6, 20)),
        ((8, 4, 3, 3), 16, (8, 4, 9)),
        ((3,), 8, (3,)),
        ((), 8, ()),
    ],
)
def test_small_dims_are_merged_but_never_to_a_vector(
    shape: tuple[int, ...], limit: int, expected: tuple[int, ...]
) -> None:
    assert merge(shape, limit) == expected


def test_blocks_tile_the_parameter_with_a_shorter_last_piece() -> None:
    covered = torch.zeros(17, 9, dtype=torch.int)
    boxes = cut((17, 9), 8)
    for box in boxes:
        covered[box] += 1
    assert len(boxes) == 6 and bool((covered == 1).all())


def test_a_step_by_hand() -> None:
    """W = 0, G = diag(3, 4), sums of outer products: roots diag(9, 16)^(-1/4), twice, so U = diag(1, 1)."""
    grad = torch.diag(torch.tensor([3.0, 4.0]))
    options: dict[str, Any] = SUMS | {"lr": 0.5}
    plain = run({"w": torch.zeros(2, 2)}, [{"w": grad}], **options)["w"]
    torch.testing.assert_close(plain, -0.5 * torch.eye(2, dtype=torch.float64))
    grafted = run({"w": torch.zeros(2, 2)}, [{"w": grad}], **(options | {"grafting": "sgd"}))["w"]
    torch.testing.assert_close(grafted, -0.5 * 5.0 / math.sqrt(2.0) * torch.eye(2, dtype=torch.float64))
    scaled = run({"w": torch.zeros(2, 2)}, [{"w": grad}], **(options | {"grafting": "rms"}))["w"]
    torch.testing.assert_close(scaled, -0.5 * 0.4 * math.sqrt(2.0) * torch.eye(2, dtype=torch.float64))
    # the second step doubles both factors, so the update of the same gradient shrinks by 2^(-1/2)
    twice = run({"w": torch.zeros(2, 2)}, [{"w": grad}] * 2, **options)["w"]
    torch.testing.assert_close(twice, -0.5 * (1 + 2**-0.5) * torch.eye(2, dtype=torch.float64))


def test_a_step_of_the_default_recipe_by_hand() -> None:
    """The first step follows G = diag(3, 4), whose root mean square is 5/2, with one of 0.4 instead.

    The second step has both gradients, divided by their root mean square 5/2: factors diag(9, 16) (4/25) / 2 with mean
    1, so diag(18, 32) / 25 after scaling. Their ridge is 0.005 times the largest. Each of two roots -1/2 is applied.
    """
    grad = torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64))
    start = {"w": torch.zeros(2, 2), "norm": torch.zeros(2)}
    grads = [{"w": grad, "norm": torch.tensor([3.0, 4.0])}] * 2
    first = run(start, grads[:1], lr=1.0)
    torch.testing.assert_close(first["w"], -torch.diag(torch.tensor([0.48, 0.64], dtype=torch.float64)))
    torch.testing.assert_close(first["norm"], torch.tensor([-3.0, -3.0], dtype=torch.float64))
    second = run(start, grads, lr=1.0)["w"] - first["w"]
    whitened = torch.tensor([3.0 / (18.0 + 0.16), 4.0 / (32.0 + 0.16)], dtype=torch.float64)
    torch.testing.assert_close(second, -0.8 * torch.diag(whitened / whitened.norm()))


def test_a_zero_eigenvalue_without_epsilon_gets_root_zero() -> None:
    grad = torch.diag(torch.tensor([3.0, 0.0]))
    result = run({"w": torch.zeros(2, 2)}, [{"w": grad}], **SUMS)["w"]
    torch.testing.assert_close(result, torch.diag(torch.tensor([-1.0, 0.0], dtype=torch.float64)))


@pytest.mark.parametrize(
    "name, make, options",
    [
        (
            "adam",
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2),
            dict(betas=(0.8, 0.9), weight_decay=0.2),
        ),
        (
            "adam",
            lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.9), eps=1e-3, weight_decay=0.2),
            dict(betas=(0.8, 0.9), weight_decay=0.2, decoupled_weight_decay=False),
        ),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, eps=1e-3), dict(betas=(0.0, 0.9))),
        (
            "rmsprop",
            lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.7, eps=1e-3, momentum=0.5),
            dict(betas=(0.0, 0.9), grafting_beta2=0.7, momentum=0.5),
        ),
        ("adagrad", lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3), dict(betas=(0.0, 0.9))),
        (
            "sgd",
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.6, nesterov=True),
            dict(betas=(0.0, 0.9), momentum=0.6, nesterov=True),
        ),
    ],
)
@pytest.mark.parametrize("exclude", [(), ("w",)])
def test_grafting_alone_is_torchs_own_optimizer(
    name: str, make: Any, options: dict[str, Any], exclude: tuple[str, ...]
) -> None:
    params, grads = random_problem(5, 7)
    weight = params["w"].clone().requires_grad_()
    optimizer = make([weight])
    for g in grads:
        weight.grad = g["w"].clone()
        optimizer.step()
    result = run(
        params,
        grads,
        lr=0.1,
        eps=1e-3,
        normalize_gradients=False,
        elementwise_lr=1.0,
        grafting=name,
        start_preconditioning_step=NEVER,
        exclude=exclude,
        max_preconditioner_dim=4,
        **options,
    )
    assert relative_error(result["w"], weight.detach()) < 1e-14


def test_the_first_preconditioned_update_is_the_polar_factor() -> None:
    params, grads = random_problem(6, 6, steps=1)
    result = run(params, grads, **SUMS)
    u, _, v = torch.linalg.svd(grads[0]["w"])
    assert relative_error(params["w"] - result["w"], u @ v) < 1e-10


def test_rotated_gradients_give_rotated_updates() -> None:
    params, grads = random_problem(6, 4)
    q, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    options: dict[str, Any] = dict(grafting="sgd", precondition_frequency=2, lr=0.1)
    plain = run(params, grads, **options)["w"] - params["w"]
    rotated = run(params, [{"w": q @ g["w"]} for g in grads], **options)["w"] - params["w"]
    assert relative_error(rotated, q @ plain) < 1e-10


def test_an_order_three_block_is_preconditioned_along_every_mode() -> None:
    params, grads = random_problem(3, 4, 5, steps=1)
    g, o = grads[0]["w"], (1e-12, 1e-6)
    options = SUMS | {"max_preconditioner_dim": 5, "epsilon": o[0], "relative_epsilon": o[1]}
    result = run(params, grads, **options)
    expected = g
    for dim in range(3):
        unfolded = g.movedim(dim, 0).flatten(1)
        lam, q = torch.linalg.eigh(unfolded @ unfolded.T)
        root = q @ torch.diag((lam + max(o[0], o[1] * lam.max().item())) ** (-1 / 6)) @ q.T
        expected = torch.einsum("ab,b...->a...", root, expected.movedim(dim, 0)).movedim(0, dim)
    assert relative_error(params["w"] - result["w"], expected) < 1e-12


def test_a_missing_gradient_skips_and_leading_zeros_do_nothing() -> None:
    params, grads = random_problem(4, 4)
    options: dict[str, Any] = dict(weight_decay=0.1, precondition_frequency=2)
    reference = Reference(params, **options)
    reference.step({"w": torch.zeros(4, 4)})
    torch.testing.assert_close(reference.values()["w"], params["w"], rtol=0, atol=0)
    for g in grads:
        reference.step({"w": None})
        reference.step(g)
    torch.testing.assert_close(reference.values()["w"], run(params, grads, **options)["w"], rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, change",
    [
        ("odd", dict(max_preconditioner_dim=1024)),
        ("wide", dict(max_preconditioner_dim=12)),
        ("odd", dict(precondition_frequency=2)),
        ("wide", dict(start_preconditioning_step=NEVER)),
        ("wide", dict(grafting="rmsprop")),
        ("odd", dict(preconditioner="shampoo")),
        ("wide", dict(normalize_gradients=False)),
        ("wide", dict(elementwise_lr=1.0)),
    ],
)
def test_the_models_tell_different_rules_apart(kind: str, change: dict[str, Any]) -> None:
    """A wrong block size, refresh or grafting must cause deviations far above the bounds of the exactness tests."""

    def final(**options: Any) -> dict[str, Tensor]:
        model = make_model(kind, torch.float64)
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        reference = Reference(trained, lr=1e-2, relative_epsilon=1e-3, eps=1e-4, exclude=("embed.weight",), **options)
        for step in range(8):
            reference.step(gradients(model, make_batch(kind, step)))
            for name, value in reference.values().items():
                trained[name].data.copy_(value)
        return reference.values()

    base: dict[str, Any] = dict(precondition_frequency=3, refresh_growth=0.0)
    base["max_preconditioner_dim"] = 8 if kind == "odd" else 16
    one, other = final(**base), final(**{**base, **change})
    assert max(relative_error(one[n], other[n]) for n in one) > 1e-2
