"""Products of a lower precision: their operands are rounded as documented, refreshes are not, and switches stay."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_deepspeed.linalg import mode_products
from shampoo_deepspeed.linalg.mode_products import add_gram_, lowered, multiply, multiply_modes
from shampoo_deepspeed.linalg.precision import full_precision, rounded, tensor_float_32
from shampoo_deepspeed.options.choices import PRECONDITIONERS
from shampoo_deepspeed.options.family import FAMILY
from tests.support.precision_switches import NEW_NAMES, SWITCHES, readings
from tests.support.precision_switches import restored_switches as restored_switches
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot

BITS = {"high": 11, "medium": 8}
SPECIAL = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-42, -1e-39, 3.3e38, 1.0, 1.0 + 2**-11, 1.0 + 2**-8)


def by_decimal(value: float, bits: int) -> float:
    """Return the value with so many significant bits, by Python's own integers: round() takes ties to even."""
    if value == 0.0 or value != value or value in (float("inf"), -float("inf")):
        return value
    numerator, denominator = value.as_integer_ratio()
    shift = abs(numerator).bit_length() - denominator.bit_length()  # the value is from 2^(shift-1) to 2^(shift+1)
    shift += abs(value) >= 2.0**shift if shift > -1022 else 0
    unit = 2.0 ** (shift - bits)
    return round(value / unit) * unit


@pytest.mark.parametrize("precision", list(BITS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operands_are_rounded_to_the_nearest_number_of_the_format(precision: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(4000, generator=generator, dtype=dtype) * 10.0 ** torch.randint(-30, 30, (4000,)).to(dtype)
    expected = torch.tensor([by_decimal(v, BITS[precision]) for v in values.tolist()], dtype=dtype)
    assert same_bits([rounded(values, precision)], [expected])
    assert same_bits([rounded(values.view(40, 100).mT, precision)], [expected.view(40, 100).mT])


@pytest.mark.parametrize("precision", list(BITS))
def test_numbers_out_of_the_usual_keep_their_kind(precision: str) -> None:
    found = rounded(torch.tensor(SPECIAL), precision)
    if precision == "medium":
        assert same_bits([found.nan_to_num(7.0)], [torch.tensor(SPECIAL).bfloat16().float().nan_to_num(7.0)])
    assert found.isnan().tolist() == [value != value for value in SPECIAL]
    assert found[2:4].tolist() == [float("inf"), -float("inf")]
    assert found[-3:].tolist() == [1.0, 1.0, 1.0 + 2**-8 if precision == "high" else 1.0]  # ties go to even
    assert found[:2].signbit().tolist() == [False, True]


def test_narrow_dtypes_are_left_as_they_are() -> None:
    values = made_up(torch.empty(5, dtype=torch.bfloat16), 0)
    assert rounded(values, "medium") is values


@pytest.mark.parametrize("precision", list(BITS))
def test_products_round_operands_and_no_sums(precision: str) -> None:
    """A float64 product of rounded operands is the exact one; float32 sums deviate by their own rounding alone."""
    stack, left = made_up(torch.empty(3, 40, 24), 0), made_up(torch.empty(3, 40, 40), 1)
    right, bits = made_up(torch.empty(3, 24, 24), 2), BITS[precision]

    def exact(values: Tensor) -> Tensor:
        return torch.tensor([by_decimal(v, bits) for v in values.flatten().tolist()]).view(values.shape).double()

    one = exact(left) @ exact(stack)
    assert torch.allclose(multiply(stack, left, 0, precision).double(), one, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(multiply(stack, left, 0).double(), one, rtol=1e-5, atol=1e-5)
    both = exact(one.float()) @ exact(right).mT  # the product in between is an operand too
    assert torch.allclose(multiply_modes(stack, {0: left, 1: right}, precision).double(), both, rtol=2e-3, atol=2e-2)
    gram, whole = torch.zeros(3, 40, 40), exact(stack) @ exact(stack).mT
    add_gram_(gram, stack, 0, 0.0, 1.0, precision)
    assert torch.allclose(gram.double().tril(), whole.tril(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preconditioner", [name for name in PRECONDITIONERS if FAMILY[name].statistics])
@pytest.mark.parametrize("solver", ["eigh", "qr"])
def test_refreshes_keep_full_precision(preconditioner: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, where = dict[str, int](), ["outside"]

    def spy(values: Tensor, precision: str) -> Tensor:
        seen[where[-1]] = seen.get(where[-1], 0) + 1
        return rounded(values, precision)

    def within(name: str, kept: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            where.append(name)
            try:
                return kept(*args)
            finally:
                where.pop()

        return called

    monkeypatch.setattr(mode_products, "rounded", spy)
    params = [parameter(12, 10)]
    optimizer = shampoo(params, preconditioner=preconditioner, solver=solver, matmul_precision="medium")
    drive(optimizer, params, range(1))
    seen.clear()
    for stack in optimizer.units[0].stacks:
        for name in ("accumulate", "compute", "install", "project", "apply"):
            monkeypatch.setattr(stack.preconditioner, name, within(name, getattr(stack.preconditioner, name)))
    drive(optimizer, params, range(1, 25))
    assert not {"compute", "install", "outside"} & set(seen), seen
    assert {"accumulate"} <= set(seen)
    assert ("apply" in seen) == (preconditioner != "soap_muon")


def trained(precision: str) -> list[Tensor]:
    params = [parameter(12, 10), parameter(5)]
    drive(shampoo(params, matmul_precision=precision), params, range(7))
    return snapshot(params)


@pytest.mark.parametrize("precision", list(BITS))
@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "none"])
def test_a_step_gives_the_same_bits_under_every_switch_and_restores_it(name: str, precision: str) -> None:
    expected = trained(precision)
    assert not same_bits(expected, trained("highest"))
    SWITCHES[name]()
    before = readings()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = trained(precision)
    assert readings() == before
    assert same_bits(found, expected)


# --- on an accelerator: products on a CUDA device that is not there


class Products(TorchDispatchMode):
    """Lists each product with the dtypes of its operands and result, and the switch that it is computed under."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype, torch.dtype, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in ("bmm", "baddbmm_"):
            self.seen.append((str(func), args[0].dtype, out.dtype, switch()))
        return out


def switch() -> Any:
    return torch.backends.cuda.matmul.fp32_precision if NEW_NAMES else torch.get_float32_matmul_precision()


FULL, LESS = ("ieee", "tf32") if NEW_NAMES else ("highest", "high")
F32, BF16 = torch.float32, torch.bfloat16
ON_DEVICE = {
    "highest": [("aten.bmm.default", F32, F32, FULL)],
    "high": [("aten.bmm.default", F32, F32, LESS), ("aten.baddbmm_.default", F32, F32, LESS)],
    "medium": [("aten.bmm.dtype", BF16, F32, FULL)] * 2,
}


@pytest.mark.parametrize("precision", list(ON_DEVICE))
def test_an_accelerator_takes_its_own_units(precision: str) -> None:
    before = readings()
    with FakeTensorMode():
        left, right = (torch.empty(2, 8, 8, device="cuda") for _ in range(2))
        with full_precision("cuda"), Products() as products:
            assert lowered(left, right, precision).device.type == "cuda"
            assert switch() == FULL
            if precision != "highest":  # torch without CUDA has no slices of such tensors
                add_gram_(torch.empty(2, 8, 8, device="cuda"), left, 0, 0.9, 0.1, precision)
    assert products.seen == ON_DEVICE[precision]
    assert readings() == before


def test_a_device_computes_float64_operands_after_rounding_them() -> None:
    with FakeTensorMode(), full_precision("cuda"), Products() as products:
        left = torch.empty(2, 8, 8, device="cuda", dtype=torch.float64)
        lowered(left, left, "high")
    assert products.seen == [("aten.bmm.default", torch.float64, torch.float64, FULL)]


def test_a_failed_product_and_one_outside_of_a_step_leave_the_switch() -> None:
    before = readings()
    with full_precision("cpu"):
        with pytest.raises(ZeroDivisionError), tensor_float_32() as on:
            assert on and switch() == LESS
            raise ZeroDivisionError
        assert switch() == FULL
    with tensor_float_32() as on:
        assert not on
    assert readings() == before


def test_products_of_another_threads_step_are_not_lowered_with_ours() -> None:
    """While both are under way, operands are rounded instead; a step that begins waits until a product is launched."""
    before, inside, leave = readings(), threading.Event(), threading.Event()
    entered = list[Any]()

    def other() -> None:
        with full_precision("cpu"):
            entered.append(switch())
            inside.set()
            assert leave.wait(60)

    thread = threading.Thread(target=other)
    with full_precision("cpu"):
        with tensor_float_32() as on:
            assert on
            thread.start()
            assert not inside.wait(0.2)  # it waits for the lock
        assert inside.wait(60)
        with tensor_float_32() as on:
            assert not on and switch() == FULL
        leave.set()
        thread.join(60)
    assert entered == [FULL]
    assert readings() == before
