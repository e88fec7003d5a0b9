"""16-bit parameters: our own float32 masters, or stochastic rounding, which does not depend on the sharding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import OptionError, Shampoo
from shampoo_deepspeed.engine.master_weights import random_bits, stochastically_rounded
from shampoo_deepspeed.geometry.boxes import Box, whole
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of, through_a_file

CPU = torch.device("cpu")


def test_a_master_makes_bfloat16_parameters_train_like_float32_ones() -> None:
    narrow = parameter(12, 8, dtype=torch.bfloat16)
    wide = nn.Parameter(narrow.detach().float())
    optimizers = [shampoo([("w", p)], lr=1e-4) for p in (narrow, wide)]
    for step in range(1, 9):
        narrow.grad = made_up(narrow, step)
        wide.grad = narrow.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        assert torch.equal(narrow, wide.to(torch.bfloat16))
    master = state_of(optimizers[0])["buffers"][0]
    assert master["kind"] == "master"
    assert torch.equal(master["buffer"].view(12, 8), wide)


def test_coupled_decay_reads_the_master() -> None:
    narrow = parameter(6, 4, dtype=torch.bfloat16)
    wide = nn.Parameter(narrow.detach().float())
    for p in (narrow, wide):
        optimizer = shampoo([("w", p)], lr=1e-4, decoupled_weight_decay=False, weight_decay=3.0)
        for step in range(1, 7):
            p.grad = made_up(narrow, step).to(p.dtype)
            optimizer.step()
    assert torch.equal(narrow, wide.to(torch.bfloat16))


def test_a_master_follows_weights_that_someone_else_has_written() -> None:
    p = parameter(6, 4, dtype=torch.bfloat16)
    optimizer = shampoo([("w", p)], lr=1e-4, weight_decay=0.0)
    drive(optimizer, [p], range(1, 4))
    fresh = torch.full_like(p, 7.0)
    with torch.no_grad():
        p.copy_(fresh)
    p.grad = torch.zeros_like(p)
    optimizer.step()
    assert (p - 7.0).abs().max() < 0.1
    assert (state_of(optimizer)["buffers"][0]["buffer"] - 7.0).abs().max() < 0.1


def test_masters_are_saved_and_loaded() -> None:
    p = parameter(6, 4, dtype=torch.bfloat16)
    optimizer = shampoo([("w", p)], lr=1e-5)
    drive(optimizer, [p], range(1, 5))
    saved, weights = through_a_file(optimizer.state_dict()), p.detach().clone()
    drive(optimizer, [p], range(5, 9))
    again = nn.Parameter(weights)
    resumed = shampoo([("w", again)], lr=1e-5)
    resumed.load_state_dict(saved)
    drive(resumed, [again], range(5, 9))
    assert same_bits(state_of(optimizer), state_of(resumed))
    assert torch.equal(p, again)


@pytest.mark.parametrize(
    ("options", "moves"),
    [
        ({}, True),
        ({"master_weights": False}, False),
        ({"master_weights": False, "stochastic_rounding": True}, True),
    ],
)
def test_steps_below_bfloat16s_resolution_are_lost_only_by_rounding_to_nearest(
    options: dict[str, Any], moves: bool
) -> None:
    p = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = Shampoo([("w", p)], lr=5e-4, **options)
    for _ in range(40):
        p.grad = torch.ones_like(p)
        optimizer.step()
    mean = p.detach().float().mean().item()
    # A block's update has a root mean square of 0.4, so each weight moves by 0.4 lr per step.
    assert mean == pytest.approx(1.0 - 40 * 0.4 * 5e-4, abs=1.5e-3) if moves else mean == 1.0


def test_stochastic_rounding_goes_up_as_often_as_the_distance_says() -> None:
    low, high = torch.tensor(1.0), torch.tensor(1.0078125)  # neighbours in bfloat16
    values = torch.full((100_000,), 1.0) + 0.3 * (high - low)
    bits = random_bits("w", values.shape, whole(values.shape), 1, CPU)
    rounded = stochastically_rounded(values, bits)
    assert set(rounded.unique().tolist()) == {low.item(), high.item()}
    assert (rounded == high).float().mean().item() == pytest.approx(0.3, abs=0.01)


def test_stochastic_rounding_leaves_what_bfloat16_holds() -> None:
    values = torch.tensor([0.0, -0.0, 1.5, -3.0, float("inf"), float("-inf"), 3.3895e38])
    values = values.to(torch.bfloat16).float()
    bits = torch.full(values.shape, 0xFFFF, dtype=torch.int32)
    assert same_bits(stochastically_rounded(values, bits).float(), values)
    assert stochastically_rounded(torch.tensor([float("nan")]), torch.tensor([5], dtype=torch.int32)).isnan().all()


def test_random_bits_depend_on_the_place_in_the_parameter_not_on_the_shard() -> None:
    shape = (6, 10)
    everything = random_bits("w", shape, whole(shape), 3, CPU).view(shape)
    part = random_bits("w", shape, Box((2, 3), (3, 5)), 3, CPU).view(3, 5)
    assert torch.equal(everything[2:5, 3:8], part)
    assert not torch.equal(everything, random_bits("w", shape, whole(shape), 4, CPU).view(shape))
    assert not torch.equal(everything, random_bits("v", shape, whole(shape), 3, CPU).view(shape))


def test_random_bits_are_uniform_in_each_bit() -> None:
    bits = random_bits("w", (200, 500), whole((200, 500)), 1, CPU)
    assert bits.min() >= 0 and bits.max() < 1 << 16
    for place in range(16):
        assert ((bits >> place) & 1).float().mean().item() == pytest.approx(0.5, abs=0.01)
    pairs = torch.stack([bits[:-1], bits[1:]]).double()
    assert abs(torch.corrcoef(pairs)[0, 1].item()) < 0.02


def test_a_step_without_a_change_keeps_the_bits() -> None:
    p = parameter(6, 4, dtype=torch.bfloat16)
    optimizer = shampoo([("w", p)], lr=0.0, master_weights=False, stochastic_rounding=True)
    (before,) = snapshot([p])
    drive(optimizer, [p], range(1, 5))
    assert same_bits(before, p.detach())


def test_stochastic_rounding_wants_bfloat16_and_no_master() -> None:
    with pytest.raises(OptionError, match="stochastic_rounding.*master_weights"):
        Shampoo([parameter(2, 2)], stochastic_rounding=True)
    with pytest.raises(OptionError, match="float16: bfloat16 only"):
        shampoo([("w", parameter(2, 2, dtype=torch.float16))], master_weights=False, stochastic_rounding=True)
    p = parameter(2, 2, dtype=torch.bfloat16)
    optimizer = shampoo([("w", p)], master_weights=False, stochastic_rounding=True)
    with pytest.raises(OptionError, match="float16: bfloat16 only"):
        optimizer.add_param_group({"params": [("v", parameter(3, 3, dtype=torch.float16))]})
    assert len(optimizer.param_groups) == 1
    frozen = parameter(3, 3, dtype=torch.float16).requires_grad_(False)  # such as the base of adapters
    optimizer.add_param_group({"params": [("base", frozen)]})
    p.data = p.data.half()
    p.grad = torch.ones_like(p)
    before = snapshot([p])
    with pytest.raises(OptionError, match="float16: bfloat16 only"):
        optimizer.step()
    assert same_bits(snapshot([p]), before)
