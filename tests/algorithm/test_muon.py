"""Muon equals torch's Muon and a float64 reference on whole matrices, and SOAP-Muon orthogonalises SOAP's update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.algorithm.preconditioners.muon import orthogonal_updates
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import matrix_of, policy_of
from shampoo_deepspeed.geometry.boxes import Box
from shampoo_deepspeed.geometry.plan import Plan, iteration_cost
from shampoo_deepspeed.linalg.orthogonalise import ITERATIONS, orthogonalised
from tests.support.multiply_adds import MultiplyAdds
from tests.support.reference import Reference
from tests.support.stepping import parameter
from tests.support.zoo import relative_error

F64 = torch.float64
STEPS = 30
SHAPES = {"wide": (24, 40), "tall": (40, 24), "square": (32, 32), "long": (2, 1100)}
MUON: dict[str, Any] = {
    "preconditioner": "muon",
    "grafting": "none",
    "normalize_gradients": False,
    "lr": 0.02,
    "betas": (0.95, 0.999),
    "weight_decay": 0.1,
}


def gradients(step: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return gradients with a falling spectrum."""
    found = {}
    for number, (name, (m, n)) in enumerate(SHAPES.items()):
        generator = torch.Generator().manual_seed(100 * step + number)
        noise = torch.randn(m, n, generator=generator, dtype=F64)
        found[name] = (noise * torch.logspace(0, -2, n, dtype=F64)).to(dtype)
    return found


def trained(optimizer: torch.optim.Optimizer, params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    for step in range(STEPS):
        for name, g in gradients(step, torch.float32).items():
            params[name].grad = g
        optimizer.step()
    return {name: p.detach() for name, p in params.items()}


def start() -> dict[str, nn.Parameter]:
    return {name: parameter(*shape, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}


def test_it_is_torchs_muon_in_float32_and_a_float64_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch iterates in bfloat16, which is as exact as that; here its own code computes in float32."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.float())
    own = start()
    found = trained(Shampoo(own.items(), **MUON), own)
    theirs = start()
    muon = torch.optim.Muon(
        theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    expected = trained(muon, theirs)
    reference = Reference(start(), **MUON)
    for step in range(STEPS):
        reference.step(gradients(step, F64))
    for name, value in reference.values().items():
        assert relative_error(found[name], expected[name].double()) < 1e-5, name
        assert relative_error(found[name], value) < 1e-5, name


def test_a_rate_of_torchs_other_length_is_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default length is sqrt(max(1, rows / columns)) instead of 0.2 sqrt(max(rows, columns))."""
    monkeypatch.setattr(Tensor, "bfloat16", lambda self: self.float())
    own, theirs = (parameter(40, 24, seed=3) for _ in range(2))
    factor = (40 / 24) ** 0.5 / (0.2 * 40**0.5)
    ours = Shampoo([("w", own)], **(MUON | {"lr": 0.02 * factor, "weight_decay": 0.0}))
    muon = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.0, momentum=0.95, nesterov=True)
    for step in range(10):
        own.grad = theirs.grad = gradients(step, torch.float32)["tall"]
        ours.step()
        muon.step()
    assert relative_error(own.detach(), theirs.detach().double()) < 1e-5


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6), (1, 7), (7, 1)])
def test_the_iteration_is_a_polynomial_of_the_singular_values(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = (left * values) @ right
    torch.testing.assert_close(orthogonalised(matrix[None])[0], expected)
    for scale in (1e-300, 1e-160, 1e160, 1e300):
        torch.testing.assert_close(orthogonalised(scale * matrix[None])[0], expected)
    for scale in (1e-30, 1e-22, 1e30):
        found = orthogonalised(scale * matrix[None].float())[0].double()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    assert orthogonalised(torch.zeros(2, *shape)).count_nonzero() == 0


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_the_plan_counts_its_multiply_adds(shape: tuple[int, int]) -> None:
    with MultiplyAdds() as counted:
        orthogonalised(torch.randn(3, *shape))
    assert counted.count == 3 * ITERATIONS * iteration_cost(shape) / 2
    costs = {}
    for name in ("soap", "soap_muon", "muon"):
        config = ShampooConfig(preconditioner=name)
        matrix = matrix_of(policy_of(Parameter("w", shape, 0, "w"), config), config)
        (block,) = Plan([matrix], [[(0, Box((0, 0), shape))]]).blocks
        costs[name] = block.step
    flops = ITERATIONS * iteration_cost(shape)
    assert costs["muon"] == flops + 4.0 * shape[0] * shape[1]
    assert costs["soap_muon"] == costs["soap"] + flops


def test_singular_values_from_a_three_hundredth_on_end_near_one() -> None:
    values = torch.logspace(0, -2.5, 400, dtype=F64)
    alone = torch.stack([torch.diag(torch.stack([(1 - v * v).sqrt(), v])) for v in values[1:]])
    found = torch.linalg.svdvals(orthogonalised(alone))
    assert found.min() > 0.68 and found.max() < 1.21


def test_matrices_stay_whole_unless_a_block_size_is_given() -> None:
    """Embeddings and vectors are element-wise as ever; the parts of a fused matrix are matrices of their own."""
    params = {
        "w": parameter(8, 1100),
        "conv": parameter(6, 4, 3, 3),
        "embed.weight": parameter(50, 8),
        "b": parameter(8),
    }

    def shapes(**options: Any) -> list[tuple[int, ...]]:
        optimizer = Shampoo(params.items(), preconditioner="muon", **options)
        for p in params.values():
            p.grad = torch.randn_like(p)
        optimizer.step()
        stacks = optimizer.state_dict()["shampoo"]["stacks"]
        return sorted(tuple(s["tensors"]["exp_avg"].shape) for s in stacks)

    assert shapes() == [(1, 6, 36), (1, 8, 1100)]
    assert shapes(max_preconditioner_dim=550) == [(1, 6, 36), (2, 8, 550)]
    assert shapes(rules=[{"match": "w", "split": [100, 1000]}]) == [(1, 6, 36), (1, 8, 100), (1, 8, 1000)]
    assert ShampooConfig().block_size == 1024 == ShampooConfig(preconditioner="soap_muon").block_size


def test_it_keeps_the_first_moment_alone_and_begins_at_the_first_step() -> None:
    config = ShampooConfig(preconditioner="muon", betas=(0.9, 0.99))
    stack = BlockStack(["a/0"], (6, 4), config, torch.device("cpu"), torch.float32)
    assert list(stack.tensors) == ["exp_avg"] and stack.refreshed == [True]
    g = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(1))
    update = stack.step(0, g.clone(), [1], config, None)
    expected = orthogonalised(g)
    torch.testing.assert_close(update, expected * (0.4 / expected.square().mean().sqrt()))


def test_soap_muon_is_soaps_update_orthogonalised() -> None:
    """Before the first refresh both have the same update. Only momentum differs, so it is given."""
    options: dict[str, Any] = {"precondition_frequency": 3, "grafting": "rms", "beta3": 0.8}
    stacks, configs = {}, {}
    for name in ("soap", "soap_muon"):
        configs[name] = ShampooConfig(preconditioner=name, **options)
        stacks[name] = BlockStack(["a/0"], (8, 6), configs[name], torch.device("cpu"), F64)
    for step in range(1, 9):
        g = torch.randn(1, 8, 6, generator=torch.Generator().manual_seed(step), dtype=F64)
        found = {n: s.step(0, g.clone(), [step], configs[n], None).clone() for n, s in stacks.items()}
        expected = found["soap"]
        if step >= 3:
            expected = orthogonal_updates(expected, configs["soap"])
            expected = expected * (0.4 / expected.square().mean().sqrt())
        torch.testing.assert_close(found["soap_muon"], expected, rtol=1e-9, atol=1e-9)
