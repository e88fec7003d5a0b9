"""KeyboardInterrupt and SystemExit pass through a step wherever they strike; nothing of the process stays changed."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shampoo_deepspeed import Shampoo, load_shampoo, save_shampoo
from shampoo_deepspeed import optimizer as face
from shampoo_deepspeed.algorithm.block_stack import BlockStack
from shampoo_deepspeed.algorithm.elementwise import Elementwise
from shampoo_deepspeed.algorithm.preconditioners.shampoo import KLShampooPreconditioner
from shampoo_deepspeed.engine.agreement import Agreement
from shampoo_deepspeed.engine.parameter_registry import ParameterRegistry
from tests.support.stepping import drive, parameter, same_bits, shampoo, snapshot, state_of

PLACES: list[tuple[Any, str]] = [
    (ParameterRegistry, "new_units"),
    (ParameterRegistry, "check"),
    (face, "shard_gradients"),
    (face, "agree"),
    (Agreement, "count_step"),
    (face, "_precondition"),
    (BlockStack, "_advance"),
    (BlockStack, "_refresh"),
    (KLShampooPreconditioner, "accumulate"),
    (KLShampooPreconditioner, "compute"),
    (KLShampooPreconditioner, "install"),
    (Elementwise, "step"),
    (face, "apply_updates"),
]


def process() -> tuple[Any, ...]:
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.mkldnn.matmul.fp32_precision if hasattr(torch.backends.mkldnn, "matmul") else None,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_num_threads(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "kind", "refresh"),
    [
        (True, KeyboardInterrupt, "background"),
        (True, SystemExit, "sync"),
        (False, KeyboardInterrupt, "sync"),
        (False, SystemExit, "background"),
    ],
)
def test_an_interrupt_passes_through_and_training_can_go_on(
    first: bool, kind: type[BaseException], refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("medium")
    before = process()
    try:
        for owner, name in PLACES:
            params = [parameter(12, 10), parameter(5)]
            options: dict[str, Any] = {"preconditioner": "kl_shampoo", "precondition_frequency": 1, "refresh": refresh}
            optimizer = shampoo(params, start_preconditioning_step=1, **options)
            drive(optimizer, params, range(0 if first else 2))
            if name == "check":
                optimizer.param_groups[0]["weight_decay"] = 0.123
            struck: list[int] = []

            def strike(*_: Any, struck: list[int] = struck, **__: Any) -> None:
                struck.append(1)
                raise kind

            with monkeypatch.context() as patched:
                patched.setattr(owner, name, strike)
                if name == "new_units" and not first:
                    continue
                with pytest.raises(kind):
                    drive(optimizer, params, [2])
                    drive(optimizer, params, [3])  # what a thread raises comes one step later
            assert struck, name
            assert process() == before, name
            gc.collect()
            try:
                drive(optimizer, params, range(3, 7))
            except kind:  # the thread's error stays
                assert refresh == "background" and name == "compute"
                continue
            assert all(torch.isfinite(p).all() for p in params), name
            optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_float32_matmul_precision("highest")


CALLS: dict[str, Callable[[Shampoo, Path], Any]] = {
    "save_shampoo": save_shampoo,
    "load_shampoo": load_shampoo,
    "state_dict": lambda optimizer, _: optimizer.state_dict(),
    "load_state_dict": lambda optimizer, _: optimizer.load_state_dict({}),
    "a copy": lambda optimizer, _: copy.deepcopy(optimizer),
    "use_averages": lambda optimizer, _: optimizer.use_averages(),
}


@pytest.mark.parametrize("call", CALLS)
def test_the_handler_of_a_signal_that_comes_within_a_step_cannot_see_half_of_it(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets an error, and the step goes on as if nothing had happened; between two steps the same call works."""
    params, others = [parameter(6, 4), parameter(5)], [parameter(6, 4), parameter(5)]
    optimizer, plain = (shampoo(own, ema_decay=0.5) for own in (params, others))
    drive(optimizer, params, range(2))
    drive(plain, others, range(3))
    save_shampoo(optimizer, tmp_path)
    step, seen = BlockStack.step, list[str]()

    def interrupted(self: BlockStack, *args: Any) -> Any:
        with pytest.raises(RuntimeError, match="within a step") as found:
            CALLS[call](optimizer, tmp_path)
        seen.append(str(found.value))
        return step(self, *args)

    monkeypatch.setattr(BlockStack, "step", interrupted)
    drive(optimizer, params, [2])
    monkeypatch.undo()
    assert seen and same_bits(snapshot(params), snapshot(others))
    assert same_bits(state_of(optimizer), state_of(plain))
    save_shampoo(optimizer, tmp_path / "after")
