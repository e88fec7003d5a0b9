"""Inputs and modes of torch that a script may meet: they change nothing, or are an error before any weight changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from shampoo_deepspeed import LayoutError, OptionError, Shampoo
from tests.support.stepping import drive, made_up, parameter, same_bits, shampoo, snapshot, state_of


@contextmanager
def default_dtype() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "default_dtype": default_dtype,
    "default_device": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
}
OPTIONS: dict[str, Any] = {"momentum": 0.9, "refresh": "staggered"}


def made(dtype: torch.dtype = torch.float32) -> tuple[list[nn.Parameter], Shampoo]:
    params = [parameter(12, 10, dtype=dtype), parameter(5, dtype=dtype), parameter(dtype=dtype)]
    return params, shampoo(params, **OPTIONS)


@pytest.mark.parametrize("change", [lambda p: p.t(), lambda p: p.reshape(5, 6), lambda p: p.reshape(3, 10)])
@pytest.mark.parametrize("loads", [False, True])
def test_a_parameter_of_another_shape_and_the_same_size_is_an_error(
    change: Callable[[Tensor], Tensor], loads: bool
) -> None:
    p = parameter(6, 5)
    optimizer = shampoo([("w", p)])
    drive(optimizer, [p], range(3))
    if loads:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    p.grad, p.data = None, change(p.data)
    before = snapshot([p])
    with pytest.raises(LayoutError, match=r"w (had|has) .*(shape|the shape)"):
        drive(optimizer, [p], [3])
    assert same_bits(snapshot([p]), before)


@pytest.mark.parametrize(
    "view",
    [torch._neg_view, lambda t: t[:1].expand(8, 6), lambda t: t[:, :1].expand(8, 6)],
    ids=["neg", "row", "column"],
)
def test_weights_that_cannot_be_written_to_are_refused_by_name(view: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(OptionError, match="parameter w cannot be written to: .* give a copy"):
        Shampoo([("w", nn.Parameter(view(torch.ones(8, 6))))])
    with torch.no_grad():
        Shampoo([("w", nn.Parameter(view(torch.ones(8, 6)), requires_grad=False)), ("b", parameter(4))])


def test_frozen_weights_that_cannot_be_trained_are_refused_by_name_once_they_are_trained() -> None:
    """The step raises before it changes anything."""
    view = nn.Parameter(torch.ones(8, 1).expand(8, 6), requires_grad=False)
    eighth = nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    half = nn.Parameter(torch.ones(4, 4).half(), requires_grad=False)
    b = parameter(4)
    named = {"view": view, "eighth": eighth, "half": half, "b": b}
    optimizer = Shampoo(list(named.items()), master_weights=False, stochastic_rounding=True)
    drive(optimizer, [b], range(2))
    before = b.detach().clone()
    for late, message in (
        (view, "parameter view cannot be written to: .* give a copy"),
        (eighth, "parameter eighth is in torch.float8_e4m3fn and is trained; allowed: .*torch.bfloat16"),
        (half, "'stochastic_rounding' = True is not allowed for parameters in torch.float16"),
    ):
        late.requires_grad_(True)
        late.grad = torch.ones(late.shape).to(late.dtype)
        with pytest.raises(OptionError, match=message):
            drive(optimizer, [b], [2])
        assert torch.equal(b, before)
        late.requires_grad_(False)
        late.grad = None
    drive(optimizer, [b], [2])
    assert not torch.equal(b, before)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_trained_weights_of_other_dtypes_are_refused_at_once(dtype: torch.dtype) -> None:
    with pytest.raises(OptionError, match=f"parameter w is in {dtype} and is trained; allowed: .*torch.bfloat16"):
        Shampoo([("w", nn.Parameter(torch.ones(4, 4).to(dtype)))])
    Shampoo([("w", nn.Parameter(torch.ones(4, 4).to(dtype), requires_grad=False)), ("b", parameter(4))])


def test_a_lazy_module_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(4))
    with pytest.raises(OptionError, match="parameter 1.weight of a lazy module has no shape yet; run one forward"):
        Shampoo(model.named_parameters())


def test_a_name_that_is_no_text_is_refused() -> None:
    layer = nn.Linear(3, 3)
    with pytest.raises(OptionError, match="1 is not allowed as the name of a parameter"):
        Shampoo([(1, layer.weight)])


def test_a_group_that_is_no_dict_gets_torchs_error() -> None:
    with pytest.raises(TypeError, match="must be a dict"):
        shampoo([parameter(3)]).add_param_group([parameter(3)])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_no_mode_of_torch_changes_a_step(mode: str, dtype: torch.dtype) -> None:
    """From the first step on, or between others; state is of use outside of the mode later."""
    plain, reference = made(dtype)
    drive(reference, plain, range(7))
    for first, last in ((0, 3), (2, 5)):
        params, optimizer = made(dtype)
        for step in range(7):
            for number, p in enumerate(params):
                p.grad = made_up(p, step, number)
            with MODES[mode]() if first <= step < last else torch.no_grad():
                optimizer.step()
        assert same_bits(snapshot(params), snapshot(plain))
        assert same_bits(state_of(optimizer), state_of(reference))
        copy.deepcopy(optimizer)


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


PARAMETRIZED: dict[str, Callable[[nn.Linear], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "own": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
}


@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parametrized_layer_learns(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    PARAMETRIZED[kind](layer)
    optimizer = Shampoo(layer.named_parameters(), model=layer, lr=1e-2, precondition_frequency=2)
    x, losses = torch.randn(32, 6), []
    target = nn.Linear(6, 6)(x).detach()
    for _ in range(12):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.isfinite().all() for p in layer.parameters())


def with_inference_tensors(g: Tensor) -> Tensor:
    with torch.inference_mode():
        return g.clone()


# Gradients of the same values in another form.
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "inference": with_inference_tensors,
    "negated_view": lambda g: torch.complex(g * 0.0, -g).conj().imag,
    "strided": lambda g: torch.stack([g, g * 7.0], -1)[..., 0],
    "transposed": lambda g: g.t().contiguous().t() if g.ndim == 2 else g,
}


@pytest.mark.parametrize("form", FORMS)
def test_the_form_of_a_gradient_changes_nothing(form: str) -> None:
    found = []
    for change in (FORMS[form], torch.clone):
        params, optimizer = made()
        for step in range(5):
            for number, p in enumerate(params):
                p.grad = change(made_up(p, step, number))
            optimizer.step()
        found.append(snapshot(params))
    assert same_bits(*found)


def test_weights_that_share_memory_train_as_separate_ones() -> None:
    base = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    shared = [nn.Parameter(base[:6]), nn.Parameter(base[6:])]
    separate = [nn.Parameter(base[:6].clone()), nn.Parameter(base[6:].clone())]
    for params in (shared, separate):
        drive(shampoo(params), params, range(6))
    assert same_bits(snapshot(shared), snapshot(separate))


def test_new_memory_with_the_same_values_changes_nothing() -> None:
    (plain, reference), (params, optimizer) = made(), made()
    drive(reference, plain, range(6))
    drive(optimizer, params, range(3))
    for p in params:
        p.data = p.data.clone()
    drive(optimizer, params, range(3, 6))
    assert same_bits(snapshot(params), snapshot(plain))


@pytest.mark.parametrize(
    "new",
    [torch.ones(7, 7), torch.ones(3, 2), torch.ones(12, 10, dtype=torch.float64)],
    ids=["longer", "shorter", "wider"],
)
def test_a_parameter_that_has_become_another_is_an_error_before_any_change(new: Tensor) -> None:
    params, optimizer = made()
    drive(optimizer, params, range(3))
    params[0].grad = None
    params[0].data = new.clone()
    before, state = snapshot(params), state_of(optimizer)
    with pytest.raises(LayoutError, match=r"0.0 had 120 elements, computed in torch.float32.*build a new"):
        drive(optimizer, params, range(3, 4))
    assert same_bits(snapshot(params), before) and same_bits(state_of(optimizer), state)


def test_a_parameter_without_memory_is_a_clear_error() -> None:
    with torch.device("meta"):
        layer = nn.Linear(4, 3)
    optimizer = Shampoo(layer.named_parameters())
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(LayoutError, match=r"are on the meta device.*to_empty"):
        optimizer.step()


def test_no_rate_moves_no_weight_and_state_goes_on() -> None:
    params, optimizer = made()
    drive(optimizer, params, range(2))
    before = snapshot(params)
    optimizer.param_groups[0]["lr"] = 0.0
    drive(optimizer, params, range(2, 5))
    assert same_bits(snapshot(params), before)
    optimizer.param_groups[0]["lr"] = 1e-2
    drive(optimizer, params, range(5, 7))
    assert set(state_of(optimizer)["steps"].values()) == {7}
    assert not same_bits(snapshot(params), before)


@pytest.mark.parametrize("scale", [-0.0, 1e-45, 1e-40])
@pytest.mark.parametrize("weights", [1.0, 1e-41])
def test_numbers_without_all_their_digits_are_numbers(scale: float, weights: float) -> None:
    params, optimizer = made()
    with torch.no_grad():
        for p in params:
            p.mul_(weights)
    for step in range(6):
        for number, p in enumerate(params):
            p.grad = made_up(p, step, number) * scale
        optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert optimizer.rejected_steps == 0
