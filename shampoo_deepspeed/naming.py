"""What a parameter is called and what kind it is, and the patterns of `exclude` and `no_decay` on both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn

# Wrappers put these into parameter names; the same parameter must have the same key with and without them.
_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def clean_name(name: str) -> str:
    """The name without the parts that torch.compile, DDP, FSDP and activation checkpointing put in."""
    parts = [part for part in name.split(".") if part not in _WRAPPER_PARTS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def names_and_kinds(model: nn.Module) -> dict[int, tuple[str, frozenset[str]]]:
    """For each parameter of a model, by ``id``: its clean name and its kinds.

    Kinds are ``embedding`` (in an nn.Embedding), ``lm_head`` (the output embeddings of a Transformers model) and
    ``layernorm`` (in an nn.LayerNorm). A tied weight has the kinds of all modules that hold it.
    """
    kinds: dict[int, set[str]] = defaultdict(set)
    for module in model.modules():
        kind = kind_of(module)
        if kind:
            for parameter in module.parameters(recurse=False):
                kinds[id(parameter)].add(kind)
    head = output_head(model)
    if head is not None and getattr(head, "weight", None) is not None:
        kinds[id(head.weight)].add("lm_head")
    return {id(p): (clean_name(name), frozenset(kinds[id(p)])) for name, p in model.named_parameters()}


def output_head(model: nn.Module) -> nn.Module | None:
    """The module of a Transformers model whose weight has the kind ``lm_head``."""
    output = getattr(model, "get_output_embeddings", None)
    head = output() if callable(output) else None
    return head if isinstance(head, nn.Module) else None


def kind_of(module: nn.Module) -> str | None:
    """The kind of a module's own parameters, None for most."""
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    return "layernorm" if isinstance(module, nn.LayerNorm) else None


def matching(patterns: Iterable[str], name: str | None, kinds: frozenset[str]) -> str | None:
    """The first pattern that a parameter matches: ``kind:NAME``, or a shell pattern on its name, ignoring case."""
    for pattern in patterns:
        if pattern.startswith("kind:"):
            if pattern.removeprefix("kind:") in kinds:
                return pattern
        elif name is not None and fnmatchcase(name.lower(), pattern.lower()):
            return pattern
    return None
