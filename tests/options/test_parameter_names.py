"""Names and kinds of parameters, and the patterns that choose among them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from shampoo_deepspeed import ShampooConfig
from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.engine.policy import policy_of
from shampoo_deepspeed.options.choices import DEFAULT_EXCLUDE, KINDS, TRAINER_NO_DECAY
from shampoo_deepspeed.options.parameter_names import as_in_model, clean_name, clean_names, matching, names_and_kinds
from tests.support.mixtures import MixtureLayer, TopKRouter
from tests.support.stepping import drive, parameter, shampoo

NOTHING: frozenset[str] = frozenset()
CLEANED = {
    "weight": "weight",
    "layers.0.attention.q.weight": "layers.0.attention.q.weight",
    "_orig_mod.layers.0.weight": "layers.0.weight",
    "module.layers.0.weight": "layers.0.weight",
    "module.module.layers.0.weight": "layers.0.weight",
    "_orig_mod.module.layers.0.weight": "layers.0.weight",
    "module._orig_mod.layers.0._orig_mod.weight": "layers.0.weight",
    "_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.weight": "layers.0.weight",
    "layers.0._checkpoint_wrapped_module.mlp.weight": "layers.0.mlp.weight",
    "layers.module.weight": "layers.module.weight",
    "module": "module",
    "submodule.weight": "submodule.weight",
}


@pytest.mark.parametrize("name", list(CLEANED))
def test_wrappers_leave_no_trace_in_a_name(name: str) -> None:
    assert clean_name(name) == CLEANED[name]
    assert clean_name(clean_name(name)) == CLEANED[name]


def test_a_wrapped_model_has_the_names_of_the_plain_one() -> None:
    class Compiled(nn.Module):
        """A wrapper that changes names as torch.compile does."""

        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self._orig_mod = inner

    plain = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    wrapped = Compiled(nn.Sequential(Compiled(plain[0]), plain[1]))
    assert names_and_kinds(wrapped) == names_and_kinds(plain)
    assert {name for name, _ in names_and_kinds(plain).values()} == {"0.weight", "0.bias", "1.weight", "1.bias"}


class Tied(nn.Module):
    """A model as in Transformers: an embedding that is also the output head, and a method that returns the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.bag = nn.EmbeddingBag(5, 4)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.table.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.out


def test_kinds_come_from_the_modules_that_hold_a_parameter() -> None:
    found = dict(names_and_kinds(Tied()).values())
    assert found == {
        "table.weight": frozenset({"embedding", "tokens", "lm_head"}),
        "bag.weight": frozenset({"embedding", "tokens"}),
        "norm.weight": frozenset({"layernorm", "norm"}),
        "norm.bias": frozenset({"layernorm", "norm"}),
        "mix.weight": NOTHING,
        "mix.bias": NOTHING,
    }


class LlamaRMSNorm(nn.Module):
    """A norm as in Transformers, which only its class name shows; it has no common base class."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


class NormalizedLinear(nn.Linear):
    """Not a norm, despite its name."""


class GatedUnit(nn.Module):
    """A module with a gate that is not a router."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 4, bias=False)
        self.up = NormalizedLinear(4, 4, bias=False)


@pytest.mark.parametrize("gate", [TopKRouter(), nn.Linear(4, 3, bias=False)])
def test_kinds_of_a_mixture_of_experts(gate: nn.Module) -> None:
    model = nn.ModuleDict({"moe": MixtureLayer(gate), "unit": GatedUnit(), "norm": LlamaRMSNorm()})
    assert dict(names_and_kinds(model).values()) == {
        "moe.gate.weight": frozenset({"router"}),
        "moe.experts.gate_up_proj": frozenset({"experts"}),
        "moe.experts.down_proj_bias": frozenset({"experts"}),
        "unit.gate.weight": NOTHING,
        "unit.up.weight": NOTHING,
        "norm.weight": frozenset({"norm"}),
    }


def test_every_kind_of_module_can_be_named_by_a_pattern() -> None:
    models = (Tied(), MixtureLayer(TopKRouter()))
    found = {kind for model in models for _, kinds in names_and_kinds(model).values() for kind in kinds}
    assert found <= set(KINDS) and {kind for kind in KINDS if not kind.endswith("d") or kind == "lm_head"} <= found


class Headless(Tied):
    """No output head that it tells of."""

    def get_output_embeddings(self) -> nn.Module:
        return None  # type: ignore[return-value]


def test_an_embedding_that_another_module_shares_is_the_output_head_too() -> None:
    assert dict(names_and_kinds(Headless()).values())["table.weight"] == frozenset({"embedding", "tokens", "lm_head"})


def test_a_model_without_an_output_head_has_no_lm_head() -> None:
    model = Headless()
    model.out = nn.Linear(4, 7, bias=False)
    found = dict(names_and_kinds(model).values())
    assert (found["table.weight"], found["out.weight"]) == (frozenset({"embedding", "tokens"}), NOTHING)


def test_a_wrapper_changes_no_kinds() -> None:
    class Telling(Headless):
        def get_input_embeddings(self) -> nn.Module:
            return self.table

    model = Telling()
    assert names_and_kinds(nn.ModuleDict({"module": model})) == names_and_kinds(model)


def test_tokens_are_the_input_embeddings_of_a_model_that_tells_them() -> None:
    class Telling(Tied):
        def get_input_embeddings(self) -> nn.Module:
            return self.bag

    class Wordless(Tied):
        def get_input_embeddings(self) -> nn.Module:
            raise NotImplementedError

    def tables(model: nn.Module) -> set[str]:
        return {name for name, kinds in names_and_kinds(model).values() if "tokens" in kinds}

    assert (tables(Telling()), tables(Wordless())) == ({"bag.weight"}, set())


@pytest.mark.parametrize("name", ["wpe", "position_embeddings", "embed_positions", "token_type_embeddings", "pos_emb"])
def test_tables_of_positions_and_segments_are_not_tokens(name: str) -> None:
    model = nn.ModuleDict({name: nn.Embedding(3, 2), "embed_tokens": nn.Embedding(5, 2)})
    kinds = dict(names_and_kinds(model).values())
    assert (kinds[f"{name}.weight"], "tokens" in kinds["embed_tokens.weight"]) == (frozenset({"embedding"}), True)


MATCHES: list[tuple[str, str | None, frozenset[str], bool]] = [
    ("*embed*", "model.embed_tokens.weight", NOTHING, True),
    ("*embed*", "model.Embedding.weight", NOTHING, True),
    ("*EMBED*", "model.embed_tokens.weight", NOTHING, True),
    ("embed", "model.embed_tokens.weight", NOTHING, False),
    ("*.bias", "layers.0.bias", NOTHING, True),
    ("layers.[01].*", "layers.1.weight", NOTHING, True),
    ("layers.[01].*", "layers.2.weight", NOTHING, False),
    ("kind:embedding", "anything", frozenset({"embedding"}), True),
    ("kind:embedding", None, frozenset({"embedding"}), True),
    ("kind:embedding", "kind:embedding", NOTHING, False),
    ("*", None, NOTHING, False),
]


@pytest.mark.parametrize(("pattern", "name", "kinds", "expected"), MATCHES)
def test_a_pattern_matches_names_without_case_or_a_kind(
    pattern: str, name: str | None, kinds: frozenset[str], expected: bool
) -> None:
    assert matching(["nothing", pattern], name, kinds) == (pattern if expected else None)


SHAPES: list[tuple[str, tuple[int, ...], bool]] = [
    ("kind:1d", (6,), True),
    ("kind:1d", (1, 6), False),
    ("kind:3d", (2, 3, 4), True),
    ("shape:8x*", (8, 4096), True),
    ("shape:8x*", (80, 4096), False),
    ("shape:*x8", (4096, 8), True),
    ("shape:8", (8,), True),
]


@pytest.mark.parametrize(("pattern", "shape", "expected"), SHAPES)
def test_a_pattern_matches_shapes(pattern: str, shape: tuple[int, ...], expected: bool) -> None:
    assert (matching([pattern], "name", NOTHING, shape) == pattern) == expected
    assert matching([pattern], "name", NOTHING) is None


def test_the_first_pattern_that_matches_is_named() -> None:
    assert matching(["a*", "*b", "*"], "xb", NOTHING) == "*b"


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "transformer.wpe.weight",
        "model.embed_tokens.weight",
        "lm_head.weight",
        "bert.embeddings.word_embeddings.weight",
        "layers.0.mlp.router.weight",
        "deepspeed_moe.gate.wg.weight",
        "layers.0.mlp.experts.down_proj_bias",
    ],
)
def test_embeddings_and_heads_of_usual_models_are_excluded_by_name(name: str) -> None:
    assert matching(DEFAULT_EXCLUDE, name, NOTHING) is not None


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.weight", "transformer.h.0.mlp.c_fc.weight", "h.0.mlp.gate_proj.weight"]
)
def test_inner_weights_of_usual_models_are_not(name: str) -> None:
    assert matching(DEFAULT_EXCLUDE, name, NOTHING) is None
    assert matching(TRAINER_NO_DECAY, name, NOTHING) is None


@pytest.mark.parametrize("name", ["h.0.ln.bias", "model.norm.weight", "h.1.input_layernorm.weight", "q_norm.weight"])
def test_norms_and_biases_are_in_the_trainers_no_decay(name: str) -> None:
    assert matching(TRAINER_NO_DECAY, name, NOTHING) is not None


def test_no_decay_patterns_keep_weights_from_decaying() -> None:
    own = {"mix.weight": parameter(6, 5), "mix.bias": parameter(6)}
    free = {name: parameter(*p.shape) for name, p in own.items()}
    decayed = {name: parameter(*p.shape) for name, p in own.items()}
    drive(shampoo(own.items(), no_decay=["*bias*"]), list(own.values()), range(3))
    drive(shampoo(free.items(), weight_decay=0.0), list(free.values()), range(3))
    drive(shampoo(decayed.items()), list(decayed.values()), range(3))
    assert torch.equal(own["mix.bias"], free["mix.bias"]) and not torch.equal(free["mix.bias"], decayed["mix.bias"])
    assert torch.equal(own["mix.weight"], decayed["mix.weight"])


@pytest.mark.parametrize(("shape", "decays"), [((6,), False), ((), False), ((1, 6), False), ((6, 5), True)])
def test_without_names_no_decay_falls_back_to_matrices_only(shape: tuple[int, ...], decays: bool) -> None:
    config = ShampooConfig(weight_decay=0.1, no_decay=("*bias*",))
    assert policy_of(Parameter("group0.0", shape, 0), config).decays == decays
    assert policy_of(Parameter("group0.0", shape, 0), ShampooConfig(weight_decay=0.1)).decays


class Nested(nn.Module):
    """A model with a part called `module`, beside one of the same inner name."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 3)
        self.weight = nn.Parameter(torch.zeros(2))
        self._orig_mod = nn.ModuleDict({"module": nn.Linear(2, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.module(x)
        return out


@pytest.mark.parametrize("outer", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), lambda m: m])
def test_only_what_wrappers_have_added_is_dropped(outer: Any) -> None:
    own = {"weight", "module.weight", "module.bias", "_orig_mod.module.weight", "_orig_mod.module.bias"}
    model = nn.DataParallel(outer(Nested()))
    assert {name for name, _ in names_and_kinds(model).values()} == own
    for given in ({"params": model.named_parameters(), "model": model}, {"params": model.named_parameters()}):
        assert {entry.parameter.key for entry in shampoo(**given).entries} == own
    loose = [(name, nn.Parameter(p.detach())) for name, p in model.named_parameters()]
    assert len({entry.parameter.key for entry in shampoo(loose).entries}) == len(own)


def test_names_of_which_only_the_text_is_known_stay_different() -> None:
    assert clean_names(["module.a", "module._orig_mod.b"]) == ["a", "b"]
    assert clean_names(["module.a", "a"]) == ["module.a", "a"]
    assert clean_names(["_orig_mod.a", "a", "_orig_mod.b"]) == ["_orig_mod.a", "a", "b"]
    assert clean_names(["module.module.a", "module.a"]) == ["module.module.a", "module.a"]
    assert clean_names([]) == []


def test_a_users_own_names_stay() -> None:
    assert as_in_model("module.layers.0.weight", "layers.0.weight") == "layers.0.weight"
    assert as_in_model("weight", "layers.0.weight") == "weight"
    assert as_in_model("module.weight", "part.module.weight") == "module.weight"
    assert as_in_model("encoder.weight", "layers.0.weight") is None


@pytest.mark.parametrize("width", [6, 7])
def test_a_head_is_known_by_the_vocabulary_unless_that_is_an_ordinary_width(width: int) -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, width), nn.Linear(width, 5), nn.Linear(5, 7, bias=False))
    assert ("lm_head" in dict(names_and_kinds(model).values())["3.weight"]) == (width == 6)


def test_every_model_inside_tells_its_head() -> None:
    class Telling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(7, 4), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 2)])

        def get_output_embeddings(self) -> nn.Module:
            return self.out

        def get_input_embeddings(self, layer: int) -> nn.Module:
            raise AssertionError("this is another method of that name")

    both = nn.ModuleDict({"first": Telling(), "second": nn.ModuleDict({"deep": Telling()})})
    heads = {name for name, kinds in names_and_kinds(both).values() if "lm_head" in kinds and name.endswith("weight")}
    assert heads == {f"{path}.out.{n}.weight" for path in ("first", "second.deep") for n in (0, 1)}


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("make", [torch.jit.script, lambda part: torch.jit.trace(part, torch.ones(1, 4))])
def test_a_part_in_torchscript_has_names_too(make: Any, freeze: bool) -> None:
    """torch's ``_modules`` of such a part is no dict."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(make(nn.Sequential(nn.Linear(4, 4))), nn.Linear(4, 4))
    for frozen in model[0].parameters() if freeze else ():
        frozen.requires_grad_(False)
    for given in (model.parameters(), model.named_parameters(), model[1].parameters()):
        optimizer = shampoo(given, model=model)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        found = {parameter.key for unit in optimizer.units for parameter in unit.parameters}
        assert found <= {"0.0.weight", "0.0.bias", "1.weight", "1.bias"} and "1.weight" in found
