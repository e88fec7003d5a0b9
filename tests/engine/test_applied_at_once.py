"""Updates that are applied bucket by bucket: the same training to the bit, and no buffer as large as the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.memory import peak_of
from shampoo_deepspeed import Shampoo, ShampooConfig
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.shard_update import AppliedAtOnce
from shampoo_deepspeed.estimate.planner import estimate
from tests.support.largest import Largest
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot

MANY = 3e-4  # megabytes of a bucket, which holds one block of 8 x 8, or a few smaller ones


def named(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    """Return matrices that are cut into blocks of several shapes, a table and a vector."""
    shapes = {"w": (21, 16), "v": (16, 9), "embed": (11, 6), "u": (8, 8), "b": (7,), "conv": (6, 3, 2, 2)}
    return {name: parameter(*shape, seed=n, dtype=dtype) for n, (name, shape) in enumerate(shapes.items())}


def groups(params: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Return two groups with rates and decays of their own."""
    items = list(params.items())
    return [{"params": items[:3], "lr": 3e-2, "weight_decay": 0.3}, {"params": items[3:]}]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Yield a list of how many pieces each call has updated."""
    calls: list[int] = []
    original = AppliedAtOnce.__call__

    def counting(self: AppliedAtOnce, boxes: Any, pieces: Any) -> None:
        calls.append(len(pieces))
        original(self, boxes, pieces)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(AppliedAtOnce, "__call__", counting)
        yield calls


def test_the_length_of_updates_is_measured_alike() -> None:
    """Frozen and other parameters without a gradient do not count, however updates are applied."""
    found = []
    for bucket_mb in (None, MANY):
        params = named()
        optimizer = shampoo(params.items(), bucket_mb=bucket_mb)
        drive(optimizer, list(params.values()), range(1))
        optimizer.metrics()
        params["u"].grad = None
        drive(optimizer, [p for name, p in params.items() if name != "u"], range(1, 3))
        found.append(optimizer.metrics()["update_rms"])
        assert (len(optimizer.units[0].exchange.buckets) > 1) == (bucket_mb is not None)
    assert found[0] > 0.0 and found[1] == pytest.approx(found[0], rel=1e-5)


def trained(bucket_mb: float | None, spike: bool = False, **options: Any) -> tuple[list[Tensor], int]:
    """Return the weights after some steps, and how many pieces were updated at once."""
    dtype = options.pop("dtype", torch.float32)
    lr = options.pop("lr", 1e-2)
    params = named(dtype)
    given = groups(params) if options.pop("grouped", False) else params.items()
    optimizer = shampoo(given, bucket_mb=bucket_mb, lr=lr.clone() if isinstance(lr, Tensor) else lr, **options)
    with counted() as calls:
        for step in range(7):
            for number, p in enumerate(params.values()):
                p.grad = made_up(p, step, number)
            if step == 3:
                params["u"].grad = None
            if spike and step == 4:
                assert params["w"].grad is not None
                params["w"].grad[3, 2] = float("nan")
            optimizer.step()
    assert len(optimizer.units[0].exchange.buckets) > 3 or bucket_mb is None
    return snapshot(params.values()), sum(calls)


AT_ONCE: dict[str, dict[str, Any]] = {
    "default": {},
    "groups": {"grouped": True},
    "rejected": {"spike": True},
    "half": {"memory": "half"},
    "l2": {"weight_decay_type": "l2"},
    "independent": {"weight_decay_type": "independent", "no_decay": ("v", "b")},
    "soap": {"preconditioner": "soap", "grafting": "adam"},
    "float64": {"dtype": torch.float64},
    "live_rate": {"lr": torch.tensor(1e-2)},
    "normalized": {"elementwise": "normalized_adam", "normalize_gradients": False},
}
IN_BUFFERS: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9},
    "averages": {"ema_decay": 0.9},
    "bfloat16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", AT_ONCE.values(), ids=AT_ONCE)
def test_training_is_that_of_one_bucket_to_the_bit(options: dict[str, Any]) -> None:
    one, none = trained(None, **options)
    many, pieces = trained(MANY, **options)
    assert same_bits(many, one)
    assert none == 0 and pieces > 50


@pytest.mark.parametrize("options", IN_BUFFERS.values(), ids=IN_BUFFERS)
def test_other_updates_wait_in_buffers(options: dict[str, Any]) -> None:
    one, _ = trained(None, **options)
    many, pieces = trained(MANY, **options)
    assert same_bits(many, one) and pieces == 0


def test_autograd_sees_that_weights_have_changed() -> None:
    p = parameter(16, 16)
    optimizer = shampoo([p], bucket_mb=MANY)
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("memory", ["full", "adamw", "half"])
def test_no_temporary_is_as_large_as_a_weight(memory: str) -> None:
    params = [parameter(256, 256), parameter(64, 512, seed=1), parameter(30, 7, seed=2)]
    optimizer = shampoo(params, max_preconditioner_dim=32, bucket_mb=0.02, memory=memory)
    drive(optimizer, params, range(4))
    for number, p in enumerate(params):
        p.grad = made_up(p, 4, number)
    with Largest() as largest:
        optimizer.step()
    assert largest.nbytes <= params[0].nbytes / 8


PLANNED: dict[str, dict[str, Any]] = {
    "full": {"memory": "full"},
    "adamw": {"memory": "adamw"},
    "half": {"memory": "half"},
    "one_bucket": {"bucket_mb": None},
    "momentum": {"momentum": 0.9},
}


@pytest.mark.parametrize("given", PLANNED.values(), ids=PLANNED)
def test_the_peak_of_a_step_is_as_planned(given: dict[str, Any]) -> None:
    options = {"max_preconditioner_dim": 128, "bucket_mb": 0.25, "precondition_frequency": 3, **given}
    params = {f"w{n}": parameter(512, 512, seed=n) for n in range(4)}
    optimizer = Shampoo(params.items(), **options)
    drive(optimizer, list(params.values()), range(4))
    peaks = []
    for step in range(4, 7):
        for number, p in enumerate(params.values()):
            p.grad = made_up(p, step, number)
        peaks.append(peak_of(optimizer.step).nbytes)
    shapes = [Parameter(name, tuple(p.shape), 0, name) for name, p in params.items()]
    made = estimate(shapes, 1, "ddp", ShampooConfig.from_options(options))
    assert 0.7 * made.step_peak[0] <= max(peaks) <= 1.15 * made.step_peak[0]


@pytest.mark.parametrize(("memory", "most"), [("full", 0.15), ("adamw", 0.15), ("half", 0.15)])
def test_100_million_parameters_need_little_more_than_their_state(memory: str, most: float) -> None:
    """By the plan, which is measured above: 12 layers of 768."""
    shapes = {
        "q": (768, 768),
        "k": (768, 768),
        "v": (768, 768),
        "o": (768, 768),
        "up": (3072, 768),
        "down": (768, 3072),
    }
    layers = [(f"{n}.{name}", shape) for n in range(12) for name, shape in shapes.items()]
    parameters = [Parameter(name, shape, 0, name) for name, shape in [("embed", (20_000, 768)), *layers]]
    made = estimate(parameters, 1, "ddp", ShampooConfig.from_options({"memory": memory}))
    assert made.elements > 100e6 and 0.0 < made.peak_share <= most
