"""``TrainingArguments(optim="shampoo", optim_args="...")``: registers the name and parses the options."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import transformers
from transformers import TrainerCallback, TrainingArguments

from shampoo_deepspeed import OptionError, ShampooConfig
from shampoo_deepspeed.options.config import canonical
from shampoo_deepspeed.options.names import ALIASES

if TYPE_CHECKING:
    from transformers.training_args import OptimizerNames

NAME = "shampoo"
_DEFAULTS = {field.name: field.default for field in fields(ShampooConfig)}


def options_from_text(text: str) -> dict[str, Any]:
    """Parse the Trainer's ``optim_args``, for example ``"precondition_frequency=5,betas=0.9;0.95"``.

    Lists are written with semicolons, as commas separate options; ``exclude=`` is the empty list. Other values are
    written as in JSON: ``true``, ``false``, ``null``, numbers, and strings without quotes.

    Raises:
        OptionError: for an unknown option, and for text that does not have this form.
    """
    options: dict[str, Any] = {}
    for part in filter(None, text.replace(" ", "").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise OptionError(f"Shampoo option {part!r} in optim_args has no value; write key=value, lists as a;b")
        if key == "rules" and value:
            raise OptionError("Shampoo option 'rules' in optim_args can only be empty; write rules in Python or JSON")
        if key in options:
            raise OptionError(f"Shampoo option {key!r} is given twice in optim_args: {text!r}")
        options[key] = _value(_DEFAULTS.get(ALIASES.get(key, key)), value)
    return canonical(options)


def _value(default: object, text: str) -> Any:
    """Convert text to the type of an option's default; the option's own check finds wrong values."""
    if ";" in text and all(not isinstance(_plain(part), str) for part in text.split(";")):
        return [_plain(part) for part in text.split(";")]
    if isinstance(default, tuple):
        parts = [part for part in text.split(";") if part]
        return [_plain(part) for part in parts] if default and isinstance(default[0], float) else parts
    if isinstance(default, str):
        return text
    return _plain(text)


def _plain(text: str) -> Any:
    constants = {"true": True, "false": False, "null": None}
    if text.lower() in constants:
        return constants[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def add_name(options_of: Callable[[TrainingArguments], dict[str, Any]], factory: type) -> None:
    """Add ``"shampoo"`` to Transformers' ``OptimizerNames``; a second call changes nothing.

    Args:
        options_of: returns the factory's options for given TrainingArguments.
        factory: the Trainer calls it without arguments, and its result with the model and these options.

    Raises:
        RuntimeError: if this version of Transformers keeps its names of optimizers in another way.
    """
    names, handlers = _tables()
    if NAME not in names._value2member_map_:
        member = str.__new__(names, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        names._member_map_[NAME.upper()] = names._value2member_map_[NAME] = member
        names._member_names_.append(NAME.upper())
    handlers[names(NAME)] = lambda context: (factory, options_of(context.args))


def add_check(callback: type[TrainerCallback]) -> None:
    """Make each Trainer that is built from now on have this callback; a second call changes nothing.

    Raises:
        RuntimeError: if this version of Transformers keeps the callbacks of all Trainers in another way.
    """
    callbacks = getattr(importlib.import_module("transformers.trainer"), "DEFAULT_CALLBACKS", None)
    if not isinstance(callbacks, list):
        raise _unknown_version()
    if callback not in callbacks:
        callbacks.append(callback)


def _tables() -> tuple[type[OptimizerNames], dict[str, Callable[..., tuple[type, dict[str, Any]]]]]:
    """Return Transformers' enum of names and its table of handlers; both are private, so their form is checked."""
    try:
        names = importlib.import_module("transformers.training_args").OptimizerNames
        handlers = importlib.import_module("transformers.trainer_optimizer")._OPTIMIZER_HANDLERS
        fits = isinstance(handlers, dict) and names("adamw_torch") in handlers and issubclass(names, str)
        fits = fits and isinstance(names._value2member_map_, dict) and isinstance(names._member_names_, list)
    except (ImportError, AttributeError, ValueError):
        fits = False
    if not fits:
        raise _unknown_version()
    return names, handlers


def _unknown_version() -> RuntimeError:
    return RuntimeError(
        f'optim="shampoo" does not work with transformers {transformers.__version__} (it works with 5.2 to 5.23); '
        'use ShampooTrainer(optimizers=(deferred(lr="auto"), None)) or '
        "Trainer(optimizer_cls_and_kwargs=(ShampooFactory, {...}))"
    )
