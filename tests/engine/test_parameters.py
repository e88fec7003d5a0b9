"""Every kind of parameter that a model may have: names, dtypes, shapes, strides, missing and odd gradients."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shampoo_deepspeed import OptionError, Shampoo
from tests.support.stepping import OPTIONS, drive, made_up, parameter, same_bits, shampoo, snapshot, state_of, train
from tests.support.zoo import make_model, relative_error


def keys_of(optimizer: Shampoo) -> set[str]:
    """Return the keys of all parameters that have state."""
    own = optimizer.state_dict()["shampoo"]
    blocks = {key.rsplit("/", 1)[0] for stack in own["stacks"] for key in stack["keys"]}
    return blocks | elementwise_keys(optimizer)


def elementwise_keys(optimizer: Shampoo) -> set[str]:
    """Return the keys of the element-wise parameters that have state."""
    return {segment[0] for part in state_of(optimizer)["elementwise"] for segment in part["segments"]}


def test_names_come_from_pairs_or_from_the_model_and_state_is_the_same() -> None:
    by_pairs, by_model = make_model("odd"), make_model("odd")
    first, second = shampoo(by_pairs.named_parameters()), shampoo(by_model.parameters(), model=by_model)
    train(by_pairs, first, range(4))
    train(by_model, second, range(4))
    trained = {name for name, p in by_pairs.named_parameters() if p.requires_grad}
    assert keys_of(first) == keys_of(second) == trained
    assert same_bits(snapshot(by_pairs.parameters()), snapshot(by_model.parameters()))


def test_kinds_are_known_however_the_optimizer_is_built() -> None:
    """An embedding and a head with other names are excluded, whether the module is given or found."""
    model = nn.Sequential(nn.Embedding(12, 10), nn.Linear(10, 9), nn.Linear(9, 12))
    for params in (dict(model.named_parameters()).items(), dict(model.named_parameters()).values()):
        for given in (model, None):
            optimizer = shampoo(params, model=given)
            drive(optimizer, list(model.parameters()), range(1))
            assert elementwise_keys(optimizer) == {"0.weight", "1.bias", "2.weight", "2.bias"}


def test_without_names_state_is_keyed_by_group_and_place() -> None:
    optimizer = shampoo([{"params": [parameter(9, 4), parameter(3)]}, {"params": [parameter(5)]}])
    drive(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(1))
    assert keys_of(optimizer) == {"group0.0", "group0.1", "group1.0"}


@pytest.mark.parametrize("how", ["pairs", "model"])
def test_a_compiled_model_has_the_names_of_the_plain_one(how: str) -> None:
    plain = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 3))
    compiled: Any = torch.compile(plain, backend="eager")
    optimizer = shampoo(compiled.named_parameters()) if how == "pairs" else shampoo(plain.parameters(), model=compiled)
    before = snapshot(plain.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        compiled(torch.ones(4, 10)).square().sum().backward()
        optimizer.step()
    assert keys_of(optimizer) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert not same_bits(snapshot(plain.parameters()), before)


def test_a_tied_weight_is_one_parameter() -> None:
    """The zoo's embedding is also its output head; both modules' gradients add up before the single step."""
    model = make_model("odd")
    as_adamw: dict[str, Any] = {"elementwise_lr": 1.0, "tied_embedding_lr": 1.0, "normalize_gradients": False}
    optimizer = shampoo(model.named_parameters(), **as_adamw)
    train(model, optimizer, range(4))
    assert "embed.weight" in keys_of(optimizer) and "head.weight" not in keys_of(optimizer)
    assert model.get_parameter("head.weight") is model.get_parameter("embed.weight")
    twin = make_model("odd")
    only = [twin.get_parameter("embed.weight")]
    adamw = torch.optim.AdamW(only, lr=OPTIONS["lr"], weight_decay=OPTIONS["weight_decay"])
    rest = shampoo(((n, p) for n, p in twin.named_parameters() if p is not only[0]), **as_adamw)
    for step in range(4):
        train(twin, rest, [step])
        adamw.step()
    # Excluded embeddings take AdamW's own steps, so a second step or a lost half of the gradient would show.
    assert relative_error(model.get_parameter("embed.weight").detach(), only[0].detach()) < 1e-5


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises(OptionError, match="two parameters have the name 'w'"):
        Shampoo([{"params": [("w", parameter(3))]}, {"params": [("w", parameter(3))]}])
    with pytest.raises(OptionError, match="two parameters have the name 'module.w'"):
        Shampoo([("module.w", parameter(3)), ("module.w", parameter(3))])


def test_a_complex_parameter_is_refused_at_once() -> None:
    with pytest.raises(OptionError, match="parameter w is complex; Shampoo supports real parameters only"):
        Shampoo([("v", parameter(3)), ("w", nn.Parameter(torch.zeros(3, dtype=torch.complex64)))])


def test_a_lone_tensor_instead_of_a_list_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="iterable of parameters"):
        Shampoo(parameter(3))


def test_a_sparse_gradient_is_a_clear_error() -> None:
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = shampoo(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    before = snapshot(embedding.parameters())
    with pytest.raises(RuntimeError, match="sparse gradients.*sparse=False"):
        optimizer.step()
    assert same_bits(snapshot(embedding.parameters()), before)


@pytest.mark.parametrize("name", ["p", "bias"])
def test_a_parameter_without_a_gradient_is_left_alone_and_does_not_count_the_step(name: str) -> None:
    """It gets no decay and no momentum, and its later steps are those that it would have taken without the pause."""
    own = {"p": parameter(12, 10), "bias": parameter(5), "other": parameter(12, 10)}
    twin = {"p": parameter(12, 10), "bias": parameter(5)}[name]
    optimizer, alone = shampoo(own.items(), momentum=0.9), shampoo([(name, twin)], momentum=0.9)

    def step(number: int, paused: bool) -> None:
        for key, p in own.items():
            p.grad = None if key == name and paused else made_up(p, number)
        optimizer.step()

    for number in range(4):
        step(number, False)
        drive(alone, [twin], [number])
    held = snapshot([own[name]])
    for number in range(4, 7):
        step(number, True)
        assert same_bits(snapshot([own[name]]), held)
    for number in range(7, 12):
        step(number, False)
        drive(alone, [twin], [number])
    assert torch.equal(own[name], twin)


def test_a_step_without_any_gradient_does_nothing() -> None:
    p = parameter(12, 10)
    optimizer = shampoo([p], momentum=0.9)
    optimizer.step()
    drive(optimizer, [p], range(4))
    optimizer.zero_grad()
    before, state = snapshot([p]), state_of(optimizer)
    optimizer.step()
    assert same_bits(snapshot([p]), before)
    assert same_bits(state_of(optimizer), state)


def test_a_frozen_parameter_stays_as_it_is() -> None:
    model = make_model("odd")
    frozen = model.get_parameter("frozen.weight").detach().clone()
    train(model, shampoo(model.named_parameters()), range(5))
    assert torch.equal(model.get_parameter("frozen.weight"), frozen)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (5, 1), (1, 7), (3, 1, 4), (2, 3, 4, 5)])
def test_parameters_of_any_shape_move(shape: tuple[int, ...]) -> None:
    p = parameter(*shape)
    before = p.detach().clone()
    drive(shampoo([p], weight_decay=0.0), [p], range(5))
    assert torch.isfinite(p).all()
    assert (p != before).all()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 3)])
def test_empty_parameters_are_taken_and_do_not_disturb(shape: tuple[int, ...]) -> None:
    empty, p, alone = parameter(*shape), parameter(12, 10), parameter(12, 10)
    optimizer = shampoo([empty, p], momentum=0.9)
    drive(optimizer, [p, empty], range(5))
    drive(shampoo([alone], momentum=0.9), [alone], range(5))
    assert torch.equal(p, alone)
    again = shampoo([empty, p], momentum=0.9)
    again.load_state_dict(optimizer.state_dict())
    drive(again, [p, empty], range(5, 8))
    assert empty.shape == shape


def transposed(value: Tensor) -> Tensor:
    return value.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(value: Tensor) -> Tensor:
    return value.contiguous(memory_format=torch.channels_last)


def every_other(value: Tensor) -> Tensor:
    """Return a view into a larger tensor, with an offset and gaps."""
    big = torch.zeros(*value.shape[:-1], 2 * value.shape[-1] + 1)
    big[..., 1::2] = value
    return big[..., 1::2]


def every_second(value: Tensor) -> Tensor:
    """Return a tensor with even gaps; flattening it gives a view that has the gaps too."""
    big = torch.full((*value.shape[:-1], 2 * value.shape[-1]), 7.0)
    big[..., ::2] = value
    return big[..., ::2]


LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "transposed_matrix": (transposed, (12, 10)),
    "transposed_conv": (transposed, (6, 4, 3, 3)),
    "channels_last": (channels_last, (6, 4, 3, 3)),
    "strided_view": (every_other, (12, 10)),
    "even_gaps": (every_second, (12, 10)),
    "strided_vector": (every_other, (7,)),
}
DECAYS: list[dict[str, Any]] = [{}, {"decoupled_weight_decay": False, "momentum": 0.9, "nesterov": True}]


@pytest.mark.slow
@pytest.mark.parametrize("options", DECAYS)
@pytest.mark.parametrize("odd_gradient", [False, True])
@pytest.mark.parametrize("odd_parameter", [False, True])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_memory_layout_changes_nothing(
    name: str, odd_parameter: bool, odd_gradient: bool, options: dict[str, Any]
) -> None:
    layout, shape = LAYOUTS[name]
    plain = parameter(*shape)
    p = nn.Parameter(layout(plain.detach())) if odd_parameter else parameter(*shape)
    strides = p.stride()
    optimizer, other = shampoo([p], **options), shampoo([plain], **options)
    for step in range(7):
        gradient = made_up(plain, step)
        plain.grad, p.grad = gradient, layout(gradient) if odd_gradient else gradient.clone()
        optimizer.step()
        other.step()
    assert torch.equal(p, plain)
    assert p.stride() == strides


@pytest.mark.parametrize("shape", [(12, 10), (7,)])
def test_a_gradient_of_repeated_memory_is_read_right(shape: tuple[int, ...]) -> None:
    p, plain = parameter(*shape), parameter(*shape)
    optimizer, other = shampoo([p]), shampoo([plain])
    for _ in range(4):
        p.grad, plain.grad = torch.tensor(0.5).expand(shape), torch.full(shape, 0.5)
        optimizer.step()
        other.step()
    assert torch.equal(p, plain)


def test_every_element_of_a_reshaped_conv_gets_its_own_update() -> None:
    """Weights of a conv, and of the equivalent linear layer on unfolded patches, take the same steps."""
    conv = parameter(6, 4, 3, 3)
    linear = nn.Parameter(conv.detach().reshape(6, 36).clone())
    first, second = shampoo([conv], max_preconditioner_dim=64), shampoo([linear], max_preconditioner_dim=64)
    for step in range(7):
        conv.grad = made_up(conv, step)
        linear.grad = conv.grad.reshape(6, 36).clone()
        first.step()
        second.step()
    assert torch.equal(conv.reshape(6, 36), linear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_float32_state_and_move(dtype: torch.dtype) -> None:
    """The first step equals that of float32 masters with the same numbers, rounded once."""
    p, bias = parameter(12, 10, dtype=dtype), parameter(5, dtype=dtype)
    wide, wide_bias = nn.Parameter(p.detach().float()), nn.Parameter(bias.detach().float())
    optimizer, other = shampoo([p, bias], momentum=0.9), shampoo([wide, wide_bias], momentum=0.9)
    before = snapshot([p, bias])
    for step in range(5):
        for narrow, master in ((p, wide), (bias, wide_bias)):
            narrow.grad = made_up(narrow, step)
            master.grad = narrow.grad.float()
        optimizer.step()
        other.step()
        if step == 0:
            assert torch.equal(p, wide.to(dtype)) and torch.equal(bias, wide_bias.to(dtype))
    own = state_of(optimizer)
    parts = [*own["stacks"], *own["elementwise"]]
    dtypes = {t.dtype for part in parts for t in part["tensors"].values()} | {m["buffer"].dtype for m in own["buffers"]}
    assert dtypes == {torch.float32}
    assert (p != before[0]).float().mean() > 0.9 and (bias != before[1]).all()
    assert relative_error(p.detach(), wide.detach()) < 5 * torch.finfo(dtype).eps


def test_float64_parameters_keep_float64_moments() -> None:
    p = parameter(12, 10, dtype=torch.float64)
    optimizer = shampoo([p, bias := parameter(5, dtype=torch.float64)], grafting="adam")
    drive(optimizer, [p, bias], range(4))
    own = state_of(optimizer)
    for part in [*own["stacks"], *own["elementwise"]]:
        assert part["tensors"]["exp_avg"].dtype == part["tensors"]["second_moment"].dtype == torch.float64


def test_parameters_of_several_dtypes_share_one_optimizer() -> None:
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    params = [parameter(12, 10, dtype=dtype) for dtype in dtypes]
    alone = [parameter(12, 10, dtype=dtype) for dtype in dtypes]
    drive(shampoo(params), params, range(5))
    for number, p in enumerate(alone):
        drive(shampoo([p]), [p], range(5), salt=number)
    assert same_bits(snapshot(params), snapshot(alone))


def test_nothing_keeps_parameters_alive_before_the_first_step() -> None:
    """Frameworks replace them by flat shards; keeping the whole parameters would cost the memory of the model."""
    model = nn.Sequential(nn.Linear(10, 12), nn.LayerNorm(12))
    optimizer = shampoo(model.parameters(), model=model)
    references = [weakref.ref(p) for p in model.parameters()] + [weakref.ref(m) for m in model]
    flat = parameter(100)
    optimizer.param_groups[0]["params"] = [flat]
    del model
    gc.collect()
    assert [r() for r in references] == [None] * len(references)


def test_steps_without_any_gradient_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    """This happens if a wrapper has replaced the model's parameters; nothing else would show it."""
    optimizer = shampoo([("w", parameter(4, 6))])
    for _ in range(2):
        optimizer.step()
    assert [m for m in caplog.messages if "found no gradient" in m] == caplog.messages[:1]
    drive(optimizer, [p for group in optimizer.param_groups for p in group["params"]], range(1))
    optimizer.zero_grad()
    optimizer.step()  # a later step without gradients is an ordinary one
    assert len(caplog.messages) == 1
