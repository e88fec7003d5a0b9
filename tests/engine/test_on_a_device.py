"""On a (simulated) accelerator, each row of the covering array does what it does on the CPU and waits where it may.

A block's first refresh waits in the solvers, and so do those in the background or with a tolerance. All others wait for
nothing.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.utils._pytree import tree_leaves

from shampoo_deepspeed import OptionError, Shampoo, load_shampoo, save_shampoo
from tests.support.backgrounds import wait_for_refreshes
from tests.support.combinations import FEW, PAIRS, Row, exact_part, label, options_of
from tests.support.simulated_device import NOTED, Device, Mode, OnDevice, on_device, quiet, simulate, values_of
from tests.support.stepping import made_up, parameter, same_bits

SHAPES = {"vector": (5,), "matrix": (6, 4), "conv": (4, 6, 2), "experts": (3, 2, 3, 2)}
STEPS = 14
# Where the CPU waits in the first step of a parameter, and where in a step with a refresh.
FIRST = ("any_gradient", "_parameters", "_shares", "_numels", "lanes_of", "lanes_here", "in salts_of")
REFRESHING = ("linalg/", "preconditioners/", "runtime/devices.py")  # the last one is whether the step is rejected
SCHEDULES = {"shampoo": "staggered", "kl_shampoo": "background", "soap": "sync"}
RULES: list[dict[str, Any]] = [{"preconditioner": rule, "refresh": how} for rule, how in SCHEDULES.items()]
# Rows with values that round are tried without these too, up to the bound of all others.
PAIRED = dict.fromkeys([*PAIRS, *map(exact_part, PAIRS)])
ROWS = [*FEW, *(pytest.param(row, marks=pytest.mark.slow) for row in PAIRED if row not in FEW)]


def parameters(device: Device | None) -> dict[str, nn.Parameter]:
    made = {name: parameter(*shape, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}
    return {n: nn.Parameter(on_device(p)) for n, p in made.items()} if device else made


def step(
    optimizer: Shampoo,
    params: Sequence[nn.Parameter],
    number: int,
    scale: float = 1.0,
    noise: torch.Generator | None = None,
) -> None:
    """Take a step with made-up gradients, after all that the device has been given before; noise is in last bits."""
    for n, p in enumerate(params):
        p.grad = made_up(values_of(p), number, n) * scale
        if noise is not None:
            p.grad *= 1.0 + 2.0**-22 * (torch.rand(p.grad.shape, generator=noise) - 0.5)
        if isinstance(p, OnDevice):
            p.grad = on_device(p.grad)
    optimizer.step()


def allowed(read: str, number: int, refreshed: bool) -> bool:
    """Whether the CPU may wait at this place in this step."""
    if number == 0 and read.endswith(FIRST):
        return True
    return refreshed and any(part in read for part in REFRESHING)


def waits_for_nothing(optimizer: Shampoo, options: dict[str, Any]) -> bool:
    """Whether the next step may read nothing, refresh or not: all blocks have been refreshed before."""
    if options.get("refresh") == "background" or options.get("refresh_tolerance") is not None or not optimizer.units:
        return False
    return all(all(stack.refreshed) for unit in optimizer.units for stack in unit.stacks)


def trained(
    options: dict[str, Any], device: Device | None, bad: Sequence[int] = (), seed: int | None = None
) -> list[Tensor]:
    """The parameters after all steps; asserts that the CPU waits in no other place than where it may.

    Args:
        seed: of noise in the last bits of gradients; None: without.
    """
    params = parameters(device)
    noise = None if seed is None else torch.Generator().manual_seed(seed)
    with Mode() if device else contextlib.nullcontext():
        optimizer = Shampoo(params.items(), **options)
        for number in range(STEPS):
            before, unread = len(device.reads) if device else 0, waits_for_nothing(optimizer, options)
            step(optimizer, list(params.values()), number, torch.nan if number in bad else 1.0, noise)
            if device:
                reads = device.reads[before:]
                assert not (unread and reads), (number, reads)
                with quiet(device):
                    device.catch_up()
                    begun = any(stack.pending for unit in optimizer.units for stack in unit.stacks)
                    refreshed = optimizer.metrics()["refreshed_share"] > 0.0 or begun
                assert not (
                    wrong := [read for read in reads if not allowed(read, number, refreshed or number in bad)]
                ), (number, wrong)
        optimizer.finish_step()
    assert optimizer.rejected_steps == len(bad)
    return [values_of(p) for p in params.values()]


def distance(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def same_solver(options: dict[str, Any]) -> dict[str, Any]:
    """The options with a solver of their own, as "auto" is another one on an accelerator.

    Bases that CholeskyQR and Householder's QR complete to null spaces differ there, so that ``refresh_tolerance`` may
    keep one and not the other.
    """
    if options.get("solver") == "qr" and "refresh_tolerance" in options:
        return {**options, "solver": "eigh"}
    return {"solver": "eigh", **options} if options["preconditioner"] in ("shampoo", "kl_shampoo") else options


@pytest.mark.parametrize("row", ROWS, ids=label)
def test_every_row_is_the_same_there_and_waits_only_where_it_may(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    options = same_solver(options_of(row))
    expected = trained(options, None)
    with monkeypatch.context() as patches:
        device = simulate(patches)
        found = trained(options, device)
    assert not device.mixed
    # Operands and narrow state may be rounded the other way where last bits differ, as products of other sizes do.
    if row == exact_part(row):
        assert distance(found, expected) <= 1e-5
    elif distance(found, expected) > 2e-3:  # then noise in last bits does the same on the CPU
        assert min(distance(found, trained(options, None, seed=seed)) for seed in range(6)) <= 1e-5


@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_rejected_step_waits_for_no_more_and_changes_nothing(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = same_solver(options | {"precondition_frequency": 3, "max_preconditioner_dim": 4, "lr": 1e-2})
    expected = trained(options, None, bad=(1, 7, 8))
    device = simulate(monkeypatch)
    found = trained(options, device, bad=(1, 7, 8))
    assert not device.mixed
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) <= 1e-5


@pytest.mark.parametrize("way", ["file", "state dict", "helpers", "helpers, full"])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_run_resumes_to_the_bit_and_a_save_takes_no_memory_there(
    options: dict[str, Any], way: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = options | {"precondition_frequency": 3, "max_preconditioner_dim": 4, "lr": 1e-2, "momentum": 0.5}
    device = simulate(monkeypatch)
    with Mode():
        params = parameters(device)
        optimizer = Shampoo(params.items(), **options)
        for number in range(7):
            step(optimizer, list(params.values()), number)
        again = {name: nn.Parameter(p.detach().clone()) for name, p in params.items()}
        resumed = Shampoo(again.items(), **options)
        wait_for_refreshes()  # else what their thread needs is counted too
        device.peak = before = device.live
        if way == "file":
            save_shampoo(optimizer, tmp_path)
            assert device.peak == before
            load_shampoo(resumed, tmp_path)
        elif "helpers" in way:
            how = StateDictOptions(full_state_dict="full" in way)
            optimizer.state[params["matrix"]]["kept by others"] = on_device(torch.ones(6, 4))
            model, model_again = as_model(params), as_model(again)
            live = device.live
            saved = get_optimizer_state_dict(model, optimizer, options=how)
            # Copies of elements and buffers are there one parameter at a time.
            assert device.live <= live
            assert device.peak - live <= 0.1 * live
            leaves = [value for value in tree_leaves(saved) if isinstance(value, Tensor)]
            assert {str(leaf.device) for leaf in leaves} == {"cpu"}
            set_optimizer_state_dict(model_again, resumed, saved, options=how)
            assert str(resumed.state[again["matrix"]]["kept by others"].device) == "cuda:0"
        else:
            resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for number in range(7, 11):
            for current, tensors in ((optimizer, params), (resumed, again)):
                step(current, list(tensors.values()), number)
        assert not device.mixed
    for p, q in zip(params.values(), again.values(), strict=True):
        assert same_bits(values_of(p), values_of(q))


def offloaded(options: dict[str, Any], device: Device | None, bad: Sequence[int] = ()) -> tuple[Shampoo, list[Tensor]]:
    """The optimizer and its parameters, which lie on the CPU, after all steps."""
    params = parameters(None)
    with Mode() if device else contextlib.nullcontext():
        optimizer = Shampoo(params.items(), **options)
        for number in range(STEPS):
            step(optimizer, list(params.values()), number, torch.nan if number in bad else 1.0)
            if device:
                device.catch_up()
        optimizer.finish_step()
    return optimizer, [values_of(p) for p in params.values()]


def as_model(params: dict[str, nn.Parameter]) -> nn.Module:
    """A module with these parameters; Shampoo was given the same names."""
    module = nn.Module()
    for name, tensor in params.items():
        module.register_parameter(name, tensor)
    return module


def devices_of(optimizer: Shampoo) -> set[str]:
    """The devices of the blocks' state."""
    stacks = [stack for unit in optimizer.units for stack in unit.stacks]
    return {str(tensor.device) for stack in stacks for tensor in stack.tensors.values()}


@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("options", RULES, ids=str)
def test_blocks_of_shards_on_the_cpu_are_computed_on_the_accelerator(
    options: dict[str, Any], normalizes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = same_solver(options | {"precondition_frequency": 3, "max_preconditioner_dim": 4, "lr": 1e-2})
    options |= {"normalize_gradients": normalizes, "bucket_mb": 1e-4}  # several buckets
    _, expected = offloaded(options, None, bad=(7, 8))
    device = simulate(monkeypatch)
    optimizer, found = offloaded(options, device, bad=(7, 8))
    assert devices_of(optimizer) == {"cuda:0"} and optimizer.rejected_steps == 2
    assert not device.mixed
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) <= 1e-5
    copies = [read for read in device.reads if not any(part in read for part in ("linalg/", "preconditioners/"))]
    # Updates are waited for where the CPU needs them; to tell a spike, it reads how large gradients were on the device.
    assert all("in arrive" in read or "in read" in read or (not normalizes and "in _sum" in read) for read in copies)


def test_blocks_stay_with_their_shards_if_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulate(monkeypatch)
    optimizer, _ = offloaded({"compute_device": "shard"}, device)
    assert devices_of(optimizer) == {"cpu"} and not device.operators


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "cuda:0"])
def test_blocks_are_on_the_named_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulate(monkeypatch)
    optimizer, _ = offloaded({"compute_device": name}, device)
    assert devices_of(optimizer) == {name if ":" in name else "cuda:0"} and not device.mixed


@pytest.mark.parametrize(
    ("name", "there", "allowed"),
    [
        ("cuda:2", False, "one of the 2 devices of type 'cuda' that there are"),
        ("xpu", False, "auto, shard or 'cpu', where the shards lie"),
        ("cpu", True, "auto, shard or 'cuda:0', where the shards lie"),
        ("cuda:1", True, "auto, shard or 'cuda:0', where the shards lie"),
    ],
)
def test_a_device_that_blocks_cannot_have_is_an_error_at_the_first_step(
    name: str, there: bool, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = list(parameters(simulate(monkeypatch) if there else None).values())
    simulate(monkeypatch)
    with Mode():
        optimizer = Shampoo(params, compute_device=name)
        before = [values_of(p) for p in params]
        with pytest.raises(OptionError, match=f"'compute_device' = '{name}' is not allowed: here it can be {allowed}"):
            step(optimizer, params, 0)
    assert same_bits(before, [values_of(p) for p in params])


@pytest.mark.parametrize("options", RULES, ids=str)
def test_an_offloaded_run_resumes_to_the_bit(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = options | {"precondition_frequency": 3, "max_preconditioner_dim": 4, "lr": 1e-2, "momentum": 0.5}
    simulate(monkeypatch)
    with Mode():
        optimizer, _ = offloaded(options, NOTED)
        save_shampoo(optimizer, tmp_path)
        params = optimizer.param_groups[0]["params"]
        again = [nn.Parameter(p.detach().clone()) for p in params]
        resumed = Shampoo(zip(SHAPES, again, strict=True), **options)
        load_shampoo(resumed, tmp_path)
        for number in range(STEPS, STEPS + 4):
            step(optimizer, params, number)
            step(resumed, again, number)
    assert devices_of(resumed) == {"cuda:0"} and same_bits([*params], [*again])


@pytest.mark.parametrize("name", ["auto", "shard"])
def test_the_first_step_says_where_blocks_are_computed(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    simulate(monkeypatch)
    caplog.set_level("INFO")
    params = list(parameters(None).values())
    with Mode():
        step(Shampoo(params, compute_device=name), params, 0)
    there = "blocks are kept and computed on cuda:0, and their shards lie on cpu; about "
    assert (there if name == "auto" else "blocks are computed on the CPU by 1 thread, about ") in caplog.text


# In a step without refresh of one stack and no element-wise parameter; about 20 of them are those of any step.
OPERATORS = {"shampoo": 53, "kl_shampoo": 53, "soap": 66}


def operators_of_a_step(layers: int, options: dict[str, Any], device: Device) -> Counter[str]:
    """The operators of a step without refresh of a model of equal layers."""
    with Mode():
        params = [nn.Parameter(on_device(parameter(8, 8, seed=n))) for n in range(layers)]
        optimizer = Shampoo(
            params, exclude=[], refresh="sync", precondition_frequency=50, refresh_growth=0.0, **options
        )
        for number in range(3):
            step(optimizer, params, number)
        device.operators.clear()
        step(optimizer, params, 3)
    return device.operators.copy()


@pytest.mark.parametrize("rule", SCHEDULES)
def test_a_step_has_as_many_operators_for_many_layers_as_for_few(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulate(monkeypatch)
    few, many = (
        operators_of_a_step(n, {"preconditioner": rule, "start_preconditioning_step": 2}, device) for n in (2, 9)
    )
    assert few == many, many - few
    assert few.total() <= OPERATORS[rule], few


def wait_for_the_thread(optimizer: Shampoo) -> None:
    """Wait until the refreshes in the background have been computed, whether or not they fail."""
    for refresh in (r for unit in optimizer.units for stack in unit.stacks for r in stack.pending.values()):
        assert refresh is not None
        with contextlib.suppress(RuntimeError):
            refresh.result()


FAULTS = {
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "solver": RuntimeError("cusolver error: CUSOLVER_STATUS_EXECUTION_FAILED"),
    "products": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "ROCm": RuntimeError("hipsolver error: HIPSOLVER_STATUS_INTERNAL_ERROR"),
}


def failing(optimizer: Shampoo) -> list[int]:
    """How often each block's refresh has failed in a row."""
    return [count for unit in optimizer.units for stack in unit.stacks for count in stack.failures]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("options", RULES, ids=str)
def test_a_refresh_that_the_device_cannot_do_counts_as_failed_and_training_goes_on(
    options: dict[str, Any], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Roots stay as they are; later refreshes are as if nothing had been wrong."""
    device = simulate(monkeypatch)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    params = list(parameters(device).values())
    own: dict[str, Any] = {
        "precondition_frequency": 1,
        "refresh_growth": 0.0,
        "max_preconditioner_dim": 4,
        "refresh_tolerance": 0.0,
    }
    with Mode():
        optimizer = Shampoo(params, exclude=[], failure_limit=5, **own, **options)
        step(optimizer, params, 0)
        step(optimizer, params, 1)
        assert not any(failing(optimizer))
        broken = {name: FAULTS[fault] for name in ("aten::_linalg_eigh", "aten::linalg_qr", "aten::linalg_cholesky_ex")}
        for number in (2, 3):
            wait_for_the_thread(optimizer)
            device.failing = dict(broken)
            step(optimizer, params, number)
        # Of those in the background, one has begun and is not known to have failed.
        assert set(failing(optimizer)) == ({1} if options["refresh"] == "background" else {2})
        device.failing.clear()
        for number in (4, 5, 6):
            step(optimizer, params, number)
        assert not any(failing(optimizer))
        device.failing = dict(broken)
        with pytest.raises(RuntimeError, match="failed 5 times in a row"):
            for number in range(7, 16):
                step(optimizer, params, number)


def test_a_refresh_that_does_not_fit_is_done_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulate(monkeypatch)
    emptied: list[int] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(device.live))
    params = [nn.Parameter(on_device(parameter(16, 16, seed=n))) for n in range(16)]
    with Mode():
        optimizer = Shampoo(
            params, exclude=[], precondition_frequency=3, refresh="sync", solver="eigh", refresh_growth=0.0
        )
        for number in range(2):
            step(optimizer, params, number)
        # A step without refresh needs less memory than a refresh of all blocks; one of a block needs little more.
        device.peak = device.live
        step(optimizer, params, 2)
        most, before = device.peak, [values_of(p) for p in params]
        assert not emptied
        for number in (3, 4):
            device.peak = device.live
            step(optimizer, params, number)
        device.limit = (most + device.peak) // 2
        assert device.peak < device.limit < most
        step(optimizer, params, 5)
    assert emptied and not any(failing(optimizer)) and not same_bits(before, [values_of(p) for p in params])


def test_an_error_after_which_the_device_is_of_no_use_ends_training(monkeypatch: pytest.MonkeyPatch) -> None:
    device = simulate(monkeypatch)
    params = list(parameters(device).values())
    with Mode():
        optimizer = Shampoo(
            params, precondition_frequency=1, preconditioner="shampoo", solver="eigh", refresh_growth=0.0
        )
        device.failing["aten::_linalg_eigh"] = RuntimeError("CUDA error: an illegal memory access was encountered")
        with pytest.raises(RuntimeError, match="illegal memory access"):
            step(optimizer, params, 0)
