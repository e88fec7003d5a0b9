"""A model's parameters without the model: built-in names, a Llama-like config.json, a file of names and shapes."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeAlias

from shampoo_deepspeed.distributed.frameworks import Parameter
from shampoo_deepspeed.options.checks import short
from shampoo_deepspeed.options.names import BRIEF
from shampoo_deepspeed.runtime import json_text

Shapes: TypeAlias = dict[str, tuple[int, ...]]

# The architecture as the model's published config.json has it.
BUILT_IN: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3-70b": {
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama-3.2-1b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
# Architectures whose parameters are those of Llama, except for biases and norms of q, k and v.
LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3")
# What Transformers 5 takes where a config.json lacks the key; in others heads and widths follow from the other numbers.
# A null always means that they do.
DEFAULTS: dict[str, dict[str, int]] = {
    "llama": {},
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
# The kinds that read these keys; others never have such biases, but for those of q, k and v that Qwen2 always has.
BIASES = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
# Entry points of this group are functions of a model's name or path; they return its parameters, or None.
ENTRY_POINTS = "shampoo_deepspeed.models"


class ModelError(ValueError):
    """A model's name or description cannot be used; the message names what is wrong and what is allowed."""


def parameters_of(model: str) -> list[Parameter]:
    """Parameters of a built-in model, of a config.json (or the folder that holds it), or of one that an adapter knows.

    Raises:
        ModelError: for an unknown name, and for a config that cannot be read.
    """
    if model.lower() in BUILT_IN:
        return _named(llama_shapes(BUILT_IN[model.lower()], model))
    path = _config_file(model)
    if path is not None:
        config = _read(path)
        if not isinstance(config, dict):
            raise ModelError(f"{path} must hold one JSON object, not {short(config, BRIEF)}")
        kind = config.get("model_type", "")
        if not isinstance(kind, str):
            raise ModelError(f"{path}: model_type = {short(kind)} is not allowed: a name, such as {LLAMA_LIKE[0]!r}")
        if kind in LLAMA_LIKE:
            return _named(llama_shapes(config, str(path)))
    for point in entry_points(group=ENTRY_POINTS):
        found: list[Parameter] | None = point.load()(model)
        if found is not None:
            return found
    close = difflib.get_close_matches(model.lower(), BUILT_IN, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else "."
    raise ModelError(
        f"--model {short(model)} is not known{hint} Built in: {', '.join(BUILT_IN)}; or a config.json with model_type "
        f"{', '.join(LLAMA_LIKE)}; other models need transformers, or --shapes with a JSON file of names and shapes"
    )


def _config_file(model: str) -> Path | None:
    """The config.json that a name stands for, if it is a file or a folder with one."""
    try:
        path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
        return path if path.is_file() else None
    except (OSError, ValueError) as error:  # such as for a name that is too long
        raise ModelError(f"--model {short(model)} is no path that can be read: {error}") from None


def parameters_of_file(path: str) -> list[Parameter]:
    """Parameters of a JSON file ``{"name": [dims], ...}``, in its order.

    Raises:
        ModelError: if it is anything else.
    """
    found = _read(Path(path))
    if not isinstance(found, dict) or not found:
        raise ModelError(f'{path} must hold one JSON object of names and shapes, {{"layer.weight": [1024, 4096], ...}}')
    for name, shape in found.items():
        good = (
            isinstance(shape, list)
            and shape
            and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
        )
        if not good:
            raise ModelError(f"{path}: {name!r} = {short(shape)} is not allowed: a list of one or more integers > 0")
    return _named({name: tuple(shape) for name, shape in found.items()})


def _named(shapes: Shapes) -> list[Parameter]:
    return [Parameter(name, shape, 0, name) for name, shape in shapes.items()]


def _read(path: Path) -> Any:
    try:
        return json_text.read(path)
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not a JSON file that can be read: {error}") from None


def llama_shapes(config: Mapping[str, Any], source: str) -> Shapes:
    """Names and shapes as in Transformers' Llama, Mistral, Qwen2 and Qwen3 for causal language modelling.

    Raises:
        ModelError: for a key that is missing or not a positive integer, and for heads without a width.
    """
    kind = config.get("model_type", "llama")
    config = {**DEFAULTS[kind], **config}
    width, inner = _dim(config, "hidden_size", source), _dim(config, "intermediate_size", source)
    layers, heads = _dim(config, "num_hidden_layers", source), _dim(config, "num_attention_heads", source)
    vocabulary = _dim(config, "vocab_size", source)
    groups = heads if config.get("num_key_value_heads") is None else _dim(config, "num_key_value_heads", source)
    head = width // heads if config.get("head_dim") is None else _dim(config, "head_dim", source)
    if head == 0 or (kind == "llama" and width % heads):
        allowed = f"a divisor of hidden_size, which is {width}"
        raise ModelError(f"{source}: num_attention_heads = {heads} is not allowed: {allowed}")
    has = {key: kind in kinds and _is_true(config, key, source) for key, kinds in BIASES.items()}
    biased = kind == "qwen2" or has["attention_bias"]
    shapes: Shapes = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q", heads * head), ("k", groups * head), ("v", groups * head)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (rows, width)
            if biased:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (width, heads * head)
        if biased and kind != "qwen2":
            shapes[f"{prefix}.self_attn.o_proj.bias"] = (width,)
        if kind == "qwen3":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (head,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (head,)
        for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
            shapes[f"{prefix}.mlp.{name}_proj.weight"] = shape
            if has["mlp_bias"]:
                shapes[f"{prefix}.mlp.{name}_proj.bias"] = shape[:1]
        shapes[f"{prefix}.input_layernorm.weight"] = (width,)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (width,)
    shapes["model.norm.weight"] = (width,)
    if not _is_true(config, "tie_word_embeddings", source):
        shapes["lm_head.weight"] = (vocabulary, width)
    return shapes


def _dim(config: Mapping[str, Any], key: str, source: str) -> int:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ModelError(f"{source}: {key} = {short(value)} is not allowed: an integer >= 1")
    return value


def _is_true(config: Mapping[str, Any], key: str, source: str) -> bool:
    value = config.get(key, False)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{source}: {key} = {short(value)} is not allowed: true or false")
    return bool(value)
