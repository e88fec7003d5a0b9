"""Narrow moments of element-wise parameters: their bytes, and the same training however parameters are cut."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import Shampoo, ShampooConfig, load_shampoo, save_shampoo
from shampoo_deepspeed.algorithm import elementwise
from shampoo_deepspeed.algorithm.elementwise import Elementwise, ElementwiseShard
from shampoo_deepspeed.algorithm.formats import bits_of, bits_of_ranges, random_bits
from shampoo_deepspeed.geometry.boxes import FlatRange
from tests.support.narrow import kept
from tests.support.narrow import random_bits as random_bits_of
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, through_a_file

NARROW: dict[str, Any] = {"elementwise_format": "bfloat16"}
METHODS: list[dict[str, Any]] = [
    {},
    {"elementwise": "sgd"},
    {"elementwise": "rmsprop", "elementwise_betas": (0.0, 0.9)},
    {"elementwise": "adagrad", "normalize_gradients": False},
    {"elementwise": "normalized_adam"},
]
SIZES = {"table": 333, "norm": 40}
# Where the shards of each parameter end: at no multiple of 8, 32, or of the number of elements together.
CUTS: dict[str, dict[str, list[int]]] = {
    "whole": {"table": [333], "norm": [40]},
    "cut": {"table": [1, 100, 117, 333], "norm": [13, 40]},
    "other": {"table": [64, 331, 333], "norm": [40]},
}


def trained(cuts: dict[str, list[int]], steps: range, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return updates and moments of the whole parameters, whose shards lie in tensors of their own."""
    config = ShampooConfig.from_options({**NARROW, **options})
    shards: list[ElementwiseShard] = []
    sizes: list[int] = []
    whole = {name: (number, size) for number, (name, size) in enumerate(SIZES.items())}
    for name, ends in cuts.items():
        for start, stop in zip([0, *ends[:-1]], ends, strict=True):
            how = (name, 0, config.elementwise_method, FlatRange(start, stop), len(shards), FlatRange(0, stop - start))
            shards.append(ElementwiseShard(whole[name][0], *how, 1.0, SIZES[name]))
            sizes.append(stop - start)
    part = Elementwise(shards, {0: config}, torch.device("cpu"), torch.float32)
    out: dict[str, list[Tensor]] = {}
    for step in steps:
        made = {
            name: torch.randn(size, generator=torch.Generator().manual_seed(10 * step + number))
            for name, (number, size) in whole.items()
        }
        gradients = [made[s.key][slice(*s.elements)] for s in shards]
        norms = torch.stack([made[name].double().square().sum() for name in SIZES])
        updates = [torch.empty(size) for size in sizes]
        normalizes = config.normalize_gradients or config.elementwise_method.startswith("normalized")
        part.step(gradients, updates, [step + 1] * 2, {0: config}, None, norms if normalizes else None)
        for name in SIZES:
            own = [update for update, shard in zip(updates, shards, strict=True) if shard.key == name]
            out.setdefault(f"{name} updates", []).append(torch.cat(own))
    found = {name: torch.cat(tensors) for name, tensors in out.items()}
    for moment, views in part.views.items():
        for name in SIZES:
            own = [view for view, shard in zip(views, shards, strict=True) if shard.key == name]
            found[f"{name} {moment}"] = torch.cat(own)
    return found


@pytest.mark.parametrize("options", METHODS, ids=str)
@pytest.mark.parametrize("cuts", ["cut", "other"])
@pytest.mark.parametrize("together", [elementwise.TOGETHER, 50])
def test_training_is_the_same_to_the_bit_wherever_parameters_are_cut(
    cuts: str, options: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trained(CUTS["whole"], range(5), options)
    monkeypatch.setattr(elementwise, "TOGETHER", together)
    cut = trained(CUTS[cuts], range(5), options)
    assert whole.keys() == cut.keys()
    assert [name for name in whole if not torch.equal(whole[name], cut[name])] == []
    moments = [tensor for name, tensor in whole.items() if "updates" not in name]
    assert moments and all(tensor.dtype == torch.bfloat16 for tensor in moments)


@pytest.mark.parametrize("together", [elementwise.TOGETHER, 50])
def test_pieces_give_the_bits_of_the_whole_in_float32_too(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = trained(CUTS["whole"], range(4), {"elementwise_format": "float32"})
    monkeypatch.setattr(elementwise, "TOGETHER", together)
    pieces = trained(CUTS["cut"], range(4), {"elementwise_format": "float32"})
    assert [name for name in usual if not torch.equal(usual[name], pieces[name])] == []


def test_bits_are_those_of_key_moment_step_and_element() -> None:
    """In the first step a moment is a multiple of the gradient, so that the oracle can round it."""
    options = {"elementwise": "sgd", "elementwise_betas": (0.5, 0.9), "normalize_gradients": False}
    found = trained(CUTS["cut"], range(1), options)
    for number, (name, size) in enumerate(SIZES.items()):
        gradient = torch.randn(size, generator=torch.Generator().manual_seed(number))
        expected = kept(0.5 * gradient, "bfloat16", "exp_avg", (name, 1))
        assert torch.equal(found[f"{name} exp_avg"].float(), expected)
        assert not torch.equal(expected, (0.5 * gradient).bfloat16().float())  # rounded at random


def test_elements_count_modulo_two_to_the_32() -> None:
    seeds = torch.tensor([5, -7], dtype=torch.int32)
    ranges = [(2**31 - 2, 4), (2**32 + 3, 3), (0, 2)]
    owners = [0, 1, 0]
    expected = [bits_of(seeds[o : o + 1], torch.arange(s, s + n))[0] for o, (s, n) in zip(owners, ranges, strict=True)]
    assert torch.equal(bits_of_ranges([seeds[o] for o in owners], ranges), torch.cat(expected))
    assert torch.equal(bits_of_ranges([seeds[1]], [(3, 9)]), random_bits(seeds[1:], 3, 9)[0])
    assert random_bits_of("w", "exp_avg", 1, 2**32 + 3) == random_bits_of("w", "exp_avg", 1, 3)


def named() -> dict[str, nn.Parameter]:
    """Return a table and a vector, which are element-wise, and a matrix."""
    return {"embed": parameter(21, 6), "b": parameter(7, seed=1), "w": parameter(9, 8, seed=2)}


def run(steps: range, like: Sequence[Tensor] | None = None, **options: Any) -> tuple[list[nn.Parameter], Shampoo]:
    values = like or list(named().values())
    params = [nn.Parameter(value.detach().clone()) for value in values]
    optimizer = shampoo(zip(named(), params, strict=True), **options)
    drive(optimizer, params, steps)
    return params, optimizer


def moments(optimizer: Shampoo) -> list[Tensor]:
    return [tensor for unit in optimizer.units for _, tensor in unit.elementwise.tensors]


@pytest.mark.parametrize(("options", "size"), [({}, 8), (NARROW, 4), ({"memory": "half"}, 4), ({"memory": "adamw"}, 8)])
def test_so_many_bytes_are_kept_for_each_element(options: dict[str, Any], size: int) -> None:
    _, optimizer = run(range(2), **options)
    assert sum(tensor.untyped_storage().nbytes() for tensor in moments(optimizer)) == size * (21 * 6 + 7)


def test_only_the_moments_are_rounded() -> None:
    """The first updates come from moments that are not rounded yet; later ones differ by the rounding of moments."""
    wide, _ = run(range(1))
    narrow, _ = run(range(1), **NARROW)
    assert same_bits(snapshot(narrow), snapshot(wide))
    wide, _ = run(range(12))
    narrow, _ = run(range(12), **NARROW)
    assert same_bits(snapshot(narrow[2:]), snapshot(wide[2:]))  # the matrix
    for a, b, start in zip(narrow, wide[:2], named().values(), strict=False):
        assert 0.0 < (a - b).norm() < 0.02 * (b - start).norm()


def test_a_slow_average_moves() -> None:
    """Rounded to nearest, a mean of squares would stand still where each step adds a thousandth of it."""
    config = ShampooConfig.from_options({**NARROW, "betas": (0.0, 0.999), "normalize_gradients": False})
    shard = ElementwiseShard(0, "p", 0, "adam", FlatRange(0, 4096), 0, FlatRange(0, 4096), 1.0, 4096)
    part = Elementwise([shard], {0: config}, torch.device("cpu"), torch.float32)
    part.views["second_moment"][0].fill_(1.0)
    for step in range(100):
        part.step([torch.zeros(4096)], [torch.empty(4096)], [step + 1], {0: config}, None, None)
    assert part.views["second_moment"][0].double().mean().item() == pytest.approx(0.999**100, rel=2e-3)
    assert torch.tensor(0.999).bfloat16() == 1.0


@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
def test_a_run_resumes_to_the_bit(way: str, tmp_path: Path) -> None:
    params, optimizer = run(range(4), **NARROW)
    found, other = run(range(0), params, **NARROW)
    if way == "state_dict":
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    else:
        save_shampoo(optimizer, tmp_path)
        load_shampoo(other, tmp_path)
    for its, own in ((params, optimizer), (found, other)):
        drive(own, its, range(4, 9))
    assert same_bits(snapshot(found), snapshot(params))
    assert same_bits(moments(other), moments(optimizer))


@pytest.mark.parametrize(("before", "after"), [({}, NARROW), (NARROW, {})], ids=["narrower", "wider"])
@pytest.mark.parametrize("way", ["state_dict", "checkpoint"])
def test_a_load_into_the_other_format_converts_and_says_so(
    before: dict[str, Any], after: dict[str, Any], way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    params, optimizer = run(range(5), **before)
    found, other = run(range(0), params, **after)
    if way == "state_dict":  # the groups get the options of the state dict, and may be changed then
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        other.param_groups[0]["elementwise_format"] = after.get("elementwise_format", "float32")
    else:
        save_shampoo(optimizer, tmp_path)
        load_shampoo(other, tmp_path)
    with caplog.at_level(logging.WARNING, logger="shampoo_deepspeed"):
        drive(other, found, range(5, 6))
    assert sum("were saved in other formats, and are converted: " in text for text in caplog.messages) == 1
    drive(optimizer, params, range(5, 6))
    wide = torch.float32 if not after else torch.bfloat16
    assert {tensor.dtype for tensor in moments(other)} == {wide}
    for a, b, start in zip(found, params, named().values(), strict=True):
        assert (a - b).norm() < 0.01 * (b - start).norm()


def test_groups_may_have_different_formats() -> None:
    """One group's narrow moments leave those of the other as they are."""

    def build(*formats: str) -> tuple[list[nn.Parameter], Shampoo]:
        params = [parameter(12, 5), parameter(12, 5, seed=1)]
        groups = [
            {"params": [(name, p)], "elementwise_format": form}
            for name, p, form in zip(("one", "two"), params, formats, strict=True)
        ]
        return params, shampoo(groups, exclude=("*",))

    results = {}
    for formats in (("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")):
        params, optimizer = build(*formats)
        drive(optimizer, params, range(5))
        again, other = build(*formats)
        other.load_state_dict(through_a_file(optimizer.state_dict()))
        for p, value in zip(again, params, strict=True):
            p.data.copy_(value)
        for own, its in ((optimizer, params), (other, again)):
            drive(own, its, range(5, 8))
        assert same_bits(snapshot(again), snapshot(params))
        results[formats] = snapshot(params)
        sizes = sorted(tensor.nbytes for tensor in moments(optimizer))
        assert sum(sizes) == 60 * sum(8 if form == "float32" else 4 for form in formats)
    plain, mixed, narrow = results.values()
    assert same_bits(mixed[1:], plain[1:]) and same_bits(mixed[:1], narrow[:1])
    assert not same_bits(mixed[:1], plain[:1])
