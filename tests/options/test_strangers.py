"""A JSON from a stranger: options are names, numbers and texts; nothing of them is imported, evaluated or opened."""

from __future__ import annotations

import builtins
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from shampoo_deepspeed import OptionError, Shampoo, ShampooConfig
from shampoo_deepspeed.options.config import OPTION_NAMES
from tests.support.stepping import parameter

TEXTS = (
    "crafted_module", "crafted_module.run", "crafted_module:run", "crafted_module.run()", "crafted_module/../x",
    "__import__('crafted_module')", "exec('import crafted_module')", "${oc.env:HOME}", "{0.__class__}", "%(x)s",
    "!!python/object/apply:crafted_module.run []", "torch.load", "file:///etc/passwd", "@/etc/passwd", "$(id)", "`id`",
)  # fmt: skip
VALUES: list[Any] = [
    *TEXTS, [*TEXTS], {"_target_": "crafted_module.run"}, {"py/object": "crafted_module.run"},
    {"__reduce__": ["crafted_module.run", []]}, [{"match": "crafted_module.run()", "lr": "crafted_module.run()"}],
    [{"match": "*", "_target_": "crafted_module.run"}],
]  # fmt: skip


FORBIDDEN = [*((builtins, name) for name in ("eval", "exec", "compile", "open")), (importlib, "import_module")]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OPTION_NAMES, "preset", "crafted_module.run", "__class__", "_target_"])
def test_no_value_of_an_option_is_imported_or_evaluated(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crafted_module.py").write_text("def run(*_): raise AssertionError('it ran')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    Shampoo([("w", parameter(4, 3))])  # which imports adapters
    called: list[str] = []
    refused: list[str] = []
    with monkeypatch.context() as patch:
        for module, function in FORBIDDEN:
            patch.setattr(module, function, lambda *_, function=function, **__: called.append(function))
        for value in VALUES:
            options = json.loads(json.dumps({name: value}))
            for build in (ShampooConfig.from_options, lambda given: Shampoo([("w", parameter(4, 3))], **given)):
                try:
                    build(options)
                except (OptionError, TypeError) as error:
                    refused.append(str(error))
    assert not called and "crafted_module" not in sys.modules
    assert all(name in text or (name == "rules" and "_target_" in text) for text in refused)
    assert len(refused) > len(VALUES) or name in ("exclude", "no_decay")  # which take patterns of names
    import crafted_module  # type: ignore[import-not-found]

    assert crafted_module.run  # so it could have been imported
    del sys.modules["crafted_module"]
