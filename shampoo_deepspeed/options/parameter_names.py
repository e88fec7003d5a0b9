"""Names and kinds of parameters, and how the patterns of `exclude`, `no_decay` and `rules` match them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

# Wrappers insert these parts into parameter names, but a parameter must have the same key with and without them.
# Adapters do not provide them, because names also come from users and checkpoints without the wrapper.
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """The name without the parts that torch.compile, DDP, FSDP and activation checkpointing insert."""
    parts = [part for part in name.split(".") if part not in _WRAPPER_PARTS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# What tables of positions and segments are called; they have few rows, each with a gradient in nearly every step.
POSITIONS = re.compile(r"wpe|pos|segment|token_type", re.IGNORECASE)


def names_and_kinds(model: nn.Module) -> dict[int, tuple[str, frozenset[str]]]:
    """For each parameter of a model, by ``id``: its clean name and its kinds.

    - ``embedding``: in an nn.Embedding
    - ``tokens``: the input embeddings of a Transformers model; in other models, embeddings that are not those of
      positions by their name
    - ``lm_head``: the output embeddings of a Transformers model, or an embedding's weight that other modules share
    - ``layernorm``: in an nn.LayerNorm
    - ``norm``: in any module whose class name ends in it
    - ``router``: in a module that sends tokens to experts
    - ``experts``: in a module that stacks the weights of many experts

    A tied weight has the kinds of all modules that hold it.
    """
    holders: dict[int, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders[id(parameter)].append(module)
    by_module, head = kinds_by_module(model), output_head(model)
    kinds = {parameter: kinds_of_holders(modules, by_module) for parameter, modules in holders.items()}
    if head is not None and getattr(head, "weight", None) is not None:
        kinds.setdefault(id(head.weight), set()).add("lm_head")  # FSDP1's modules hold views and no parameters
    return {id(p): (clean_name(name), frozenset(kinds.get(id(p), ()))) for name, p in model.named_parameters()}


def kinds_of_holders(holders: Sequence[nn.Module], by_module: Mapping[int, frozenset[str]]) -> set[str]:
    """The kinds of a parameter that these modules hold, except ``lm_head`` by ``output_head``."""
    kinds = {kind for holder in holders for kind in by_module.get(id(holder), ())}
    if len({isinstance(holder, EMBEDDINGS) for holder in holders}) == 2:
        kinds.add("lm_head")
    return kinds


def embeds_tokens(kinds: frozenset[str]) -> bool:
    """Whether a parameter of these kinds embeds tokens and is not the output head too."""
    return "tokens" in kinds and "lm_head" not in kinds


def _token_embeddings(model: nn.Module) -> list[nn.Module]:
    source, given = model, _own_method(model, "get_input_embeddings")
    if given is not None:
        try:
            source = given()
        except NotImplementedError:  # a Transformers model without tokens
            return []
    tables = [(name, module) for name, module in source.named_modules() if isinstance(module, EMBEDDINGS)]
    return [table for name, table in tables if not POSITIONS.search(name)]


def output_head(model: nn.Module) -> nn.Module | None:
    """The module of a Transformers model whose weight has the kind ``lm_head``."""
    output = _own_method(model, "get_output_embeddings")
    head = output() if output is not None else None
    return head if isinstance(head, nn.Module) else None


def _own_method(model: nn.Module, name: str) -> Callable[[], Any] | None:
    """A method of the outermost module that has it, so that DDP and other wrappers change nothing."""
    found = (getattr(module, name, None) for module in model.modules())
    return next((method for method in found if callable(method)), None)


def kinds_by_module(model: nn.Module) -> dict[int, frozenset[str]]:
    """For each module of a model, by ``id``: the kinds of its own parameters, except ``lm_head``."""
    routers = {id(part) for module in model.modules() for gate in _gates(module) for part in gate.modules()}
    tables = {id(table) for table in _token_embeddings(model)}

    def kinds(module: nn.Module) -> frozenset[str]:
        by_place = {"router": id(module) in routers, "tokens": id(module) in tables}
        return frozenset(_kinds_of(module) | {kind for kind, holds in by_place.items() if holds})

    return {id(module): kinds(module) for module in model.modules()}


def _kinds_of(module: nn.Module) -> set[str]:
    kinds, name = set(), type(module).__name__.lower()
    if isinstance(module, EMBEDDINGS):
        kinds.add("embedding")
    if isinstance(module, nn.LayerNorm):
        kinds.add("layernorm")
    if re.search(r"norm(\dd)?$", name):  # RMSNorm, LlamaRMSNorm, GroupNorm, BatchNorm2d
        kinds.add("norm")
    if "router" in name:
        kinds.add("router")
    if name.endswith("experts"):
        kinds.add("experts")
    return kinds


def _gates(module: nn.Module) -> list[nn.Module]:
    """The gates of a layer with experts; in other modules a child of that name is an ordinary weight."""
    children = dict(module.named_children())
    return [children[name] for name in ("gate", "router") if name in children and "experts" in children]


def matching(
    patterns: Iterable[str], name: str | None, kinds: frozenset[str], shape: tuple[int, ...] | None = None
) -> str | None:
    """The first pattern that a parameter matches, or None.

    ``kind:NAME``, where kinds are also ``1d``, ``2d``, ...; ``shape:4096x*``; or a shell pattern on its name, ignoring
    case.
    """
    for pattern in patterns:
        if pattern.startswith("kind:"):
            kind = pattern.removeprefix("kind:")
            if kind in kinds or (shape is not None and kind == f"{len(shape)}d"):
                return pattern
        elif pattern.startswith("shape:"):
            if shape is not None and fnmatchcase("x".join(map(str, shape)), pattern.removeprefix("shape:")):
                return pattern
        elif name is not None and fnmatchcase(name.lower(), pattern.lower()):
            return pattern
    return None
