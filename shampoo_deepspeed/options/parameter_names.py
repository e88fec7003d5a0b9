"""Names and kinds of parameters, and how the patterns of `exclude`, `no_decay` and `rules` match them."""

from __future__ import annotations

import inspect
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor, nn

# What torch.compile, FSDP1 and activation checkpointing call the module that they wrap.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)


def clean_path(model: nn.Module, path: str) -> str:
    """The dotted path of a parameter or module without the parts that wrappers have added.

    The modules on the path show which parts these are: a model may use the same words for its own.
    """
    module: nn.Module | None = model
    outer, kept = True, []
    for part in path.split("."):
        inner = wrapped_part(module, outer) if module is not None else None
        while module is not None and inner is not None and part != inner:  # FSDP1 leaves its own part out of names
            module = _children(module)[inner]
            inner = wrapped_part(module, outer) if module is not None else None
        if inner is None:
            kept.append(part)
            outer = False
        module = _children(module).get(part) if module is not None else None
    return ".".join(kept)


def _children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The parts of a module by name; a ScriptModule keeps them in something that is no dict."""
    return dict(module.__dict__.get("_modules", {}).items())


def wrapped_part(module: nn.Module, outer: bool) -> str | None:
    """The name under which a wrapper holds the module that it wraps; None for a module that is no wrapper.

    Args:
        outer: whether only wrappers are around it. There a module that holds nothing but a ``module`` is a wrapper too.
    """
    children = _children(module)
    if len(children) != 1 or any(p is not None for p in module._parameters.values()):
        return None
    (name,) = children
    is_wrapper = name in _WRAPPED or name == "module" and (outer or isinstance(module, _PARALLEL))
    return name if is_wrapper else None


def clean_name(name: str) -> str:
    """A name of which nothing but the text is known, without the parts that wrappers usually insert."""
    parts = [part for part in name.split(".") if part not in _WRAPPED]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def clean_names(names: Sequence[str]) -> list[str]:
    """`clean_name` of names that belong together, which stay different: those that would be equal stay as they are.

    A wrapper around the whole model has put its ``module`` before all names, else it is the model's own.
    """
    wrapped = all(clean_name(f"x.{name}").startswith("x.module.") for name in names)
    cleaned = [clean_name(name) if wrapped else clean_name(f"x.{name}").removeprefix("x.") for name in names]
    count = Counter(cleaned)
    return [short if count[short] == 1 else name for short, name in zip(cleaned, names, strict=True)]


def as_in_model(name: str, path: str) -> str | None:
    """A user's name for a parameter without parts that wrappers have added, or None if it is no name of the model's.

    Args:
        path: the parameter's own in the model, without wrappers. The name may be that within a part of the model.
    """
    kept: list[str] = []
    left = path.split(".")
    for part in reversed(name.split(".")):
        if left and part == left[-1]:
            kept.insert(0, left.pop())
        elif part not in (*_WRAPPED, "module"):
            return None
    return ".".join(kept) or None


EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
# What tables of positions and segments are called; they have few rows, each with a gradient in nearly every step.
POSITIONS = re.compile(r"wpe|pos|segment|token_type", re.IGNORECASE)
FEWEST_TOKENS = 1024  # in a vocabulary that is recognised by its size alone


def names_and_kinds(model: nn.Module) -> dict[int, tuple[str, frozenset[str]]]:
    """For each parameter of a model, by ``id``: its name without wrappers' parts, and its kinds.

    - ``embedding``: in an nn.Embedding
    - ``tokens``: the input embeddings of Transformers models; in other models, embeddings that are not those of
      positions by their name
    - ``lm_head``: the output embeddings of Transformers models, or an embedding's weight that other modules share; in
      other models also a linear layer with as many outputs as there are tokens
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
    by_module = kinds_by_module(model)
    kinds = {parameter: kinds_of_holders(modules, by_module) for parameter, modules in holders.items()}
    for head in output_heads(model):
        if isinstance(weight := getattr(head, "weight", None), Tensor):
            kinds.setdefault(id(weight), set()).add("lm_head")  # FSDP1's modules hold views and no parameters
    named = model.named_parameters()
    return {id(p): (clean_path(model, name), frozenset(kinds.get(id(p), ()))) for name, p in named}


def kinds_of_holders(holders: Sequence[nn.Module], by_module: Mapping[int, frozenset[str]]) -> set[str]:
    """The kinds of a parameter that these modules hold, except ``lm_head`` by ``output_heads``."""
    kinds = {kind for holder in holders for kind in by_module.get(id(holder), ())}
    if len({isinstance(holder, EMBEDDINGS) for holder in holders}) == 2:
        kinds.add("lm_head")
    return kinds


def rate_option(kinds: frozenset[str]) -> str:
    """The option that holds the factor on the rate of an element-wise parameter of these kinds."""
    if "tokens" not in kinds:
        return "elementwise_lr"
    return "tied_embedding_lr" if "lm_head" in kinds else "embedding_lr"


def _token_tables(model: nn.Module) -> list[nn.Module]:
    """The modules that embed tokens: those that models name, and any table that is in no such model."""
    told: dict[int, nn.Module] = {}
    own: set[int] = set()  # the modules of those models
    for module in _with_method(model, "get_input_embeddings"):
        own |= {id(part) for part in module.modules()}
        told |= {id(part): part for given in _given_by(module, "get_input_embeddings") for part in _tables(given)}
    return [*told.values(), *(table for table in _tables(model) if id(table) not in own)]


def _tables(model: nn.Module) -> list[nn.Module]:
    """The embeddings in a module, except those of positions and segments."""
    tables = [(name, module) for name, module in model.named_modules() if isinstance(module, EMBEDDINGS)]
    return [table for name, table in tables if not POSITIONS.search(name)]


def output_heads(model: nn.Module) -> list[nn.Module]:
    """The modules whose weight has the kind ``lm_head``, because a model names them or by the size of a vocabulary."""
    told: dict[int, nn.Module] = {}
    own: set[int] = set()  # the modules of models that know whether they have a head
    for module in _with_method(model, "get_output_embeddings"):
        own |= {id(part) for part in module.modules()}
        for head in _given_by(module, "get_output_embeddings"):
            parts = head.modules() if getattr(head, "weight", None) is None else [head]  # a list of heads
            told |= {id(part): part for part in parts}
    return [*told.values(), *(head for head in _by_vocabulary(model) if id(head) not in own)]


def _by_vocabulary(model: nn.Module) -> Iterator[nn.Module]:
    """Linear layers with an output for each token: as many as a table has rows, and as no other layer takes."""
    tables = _token_tables(model)
    widths = {getattr(module, "in_features", None) for module in model.modules()}
    widths |= {getattr(table, "embedding_dim", None) for table in tables}
    sizes = {getattr(table, "num_embeddings", None) for table in tables} - widths
    for module in model.modules() if sizes else ():
        if getattr(module, "out_features", None) in sizes and not isinstance(module, EMBEDDINGS):
            yield module


def _with_method(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules at any depth that have a method of this name. Wrappers may pass it on from the module inside."""
    return [module for module in model.modules() if callable(getattr(module, name, None))]


def _given_by(module: nn.Module, name: str) -> list[nn.Module]:
    """The module that a method without arguments gives, if it gives one."""
    method = getattr(module, name)
    try:
        inspect.signature(method).bind()
    except (TypeError, ValueError):  # another method of this name
        return []
    try:
        given = method()
    except (NotImplementedError, AttributeError):  # a Transformers model without tokens, or without a head
        return []
    return [given] if isinstance(given, nn.Module) else []


def kinds_by_module(model: nn.Module) -> dict[int, frozenset[str]]:
    """For each module of a model, by ``id``: the kinds of its own parameters, except ``lm_head``."""
    routers = {id(part) for module in model.modules() for gate in _gates(module) for part in gate.modules()}
    tables = {id(table) for table in _token_tables(model)}

    def kinds(module: nn.Module) -> frozenset[str]:
        by_place = {"router": id(module) in routers, "tokens": id(module) in tables}
        return frozenset(_kinds_of(module) | {kind for kind, holds in by_place.items() if holds})

    return {id(module): kinds(module) for module in model.modules()}


def kinds_by_shape(shapes: Sequence[tuple[int, ...]]) -> list[frozenset[str]]:
    """The kinds of parameters of which nothing but their shapes, in the model's order, is known.

    One or two matrices of the same shape embed tokens, or are the output head, if they have far more rows than any
    other matrix has rows or columns. Otherwise nothing is recognised.
    """
    matrices = [number for number, shape in enumerate(shapes) if len(shape) == 2]
    kinds = [frozenset[str]() for _ in shapes]
    rows, width = max((shapes[n] for n in matrices), default=(0, 0))
    found = [n for n in matrices if shapes[n] == (rows, width)]
    others = [dim for n in matrices if n not in found for dim in shapes[n]]
    if len(found) > 2 or rows < FEWEST_TOKENS or width not in others or rows < 2 * max(others):
        return kinds
    if len(found) == 2 or found[0] == matrices[0]:
        kinds[found[0]] |= {"embedding", "tokens"}
    kinds[found[-1]] |= {"lm_head"}  # a single one at the start is both, as nothing else could be the head
    return kinds


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
