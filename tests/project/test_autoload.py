"""Registration: `torch.optim.Shampoo` works in any script, costs nothing, breaks nothing and can be switched off."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import shampoo_deepspeed


def run(script: str, **environment: str) -> str:
    """Return what a fresh interpreter prints; it must neither fail nor warn."""
    env = {k: v for k, v in os.environ.items() if not k.endswith("_AUTOLOAD")} | environment
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
def test_torch_optim_has_the_optimizer_without_any_import_of_ours() -> None:
    """One process checks everything, because importing torch takes seconds. DeepSpeed may ask for a lower-case name."""
    script = """
import sys
import torch
loaded = sorted(name for name in sys.modules if name.startswith("shampoo_deepspeed"))
assert loaded == ["shampoo_deepspeed", "shampoo_deepspeed._autoload"], loaded
for wrong in ("NoSuchOptimizer", "shampo"):
    try:
        getattr(torch.optim, wrong)
    except AttributeError as error:
        assert str(error) == f"module 'torch.optim' has no attribute {wrong!r}", error
    else:
        raise AssertionError(wrong)
assert not hasattr(torch.optim, "SOAPP")
assert "shampoo_deepspeed.optimizer" not in sys.modules
assert torch.optim.AdamW.__module__ == "torch.optim.adamw"
optimizer = torch.optim.Shampoo([torch.nn.Parameter(torch.ones(2, 2))], lr=0.5)
assert isinstance(optimizer, torch.optim.Optimizer)
from shampoo_deepspeed import Shampoo
assert torch.optim.Shampoo is torch.optim.shampoo is getattr(torch.optim, "Shampoo") is Shampoo
print("done")
"""
    assert run(script) == "done"


@pytest.mark.slow
def test_it_can_be_switched_off_and_called_by_hand() -> None:
    """torch's hook imports the package, so importing the package must not register either."""
    script = """
import torch
print(hasattr(torch.optim, "Shampoo"))
import shampoo_deepspeed
print(hasattr(torch.optim, "Shampoo"))
shampoo_deepspeed.register()
print(torch.optim.Shampoo.__name__)
"""
    assert run(script, SHAMPOO_DEEPSPEED_AUTOLOAD="0").split() == ["False", "False", "Shampoo"]


@pytest.mark.slow
def test_if_torch_runs_no_hooks_importing_the_package_registers() -> None:
    script = """
import torch
print(hasattr(torch.optim, "Shampoo"))
import shampoo_deepspeed
print(torch.optim.Shampoo.__name__)
"""
    assert run(script, TORCH_DEVICE_BACKEND_AUTOLOAD="0").split() == ["False", "Shampoo"]


@pytest.mark.slow
def test_public_names_are_imported_together_when_the_first_is_used() -> None:
    """A later call, such as a save, then has no detour through the package's ``__getattr__``."""
    script = """
import sys
import shampoo_deepspeed
names = shampoo_deepspeed.__all__
assert shampoo_deepspeed.__version__ and set(names) & set(vars(shampoo_deepspeed)) == {"register"}
assert "shampoo_deepspeed.optimizer" not in sys.modules
assert not hasattr(shampoo_deepspeed, "shampoo")
shampoo_deepspeed.Shampoo
assert set(names) <= set(vars(shampoo_deepspeed))
print("done")
"""
    assert run(script) == "done"


@pytest.mark.slow
def test_everything_works_if_no_framework_is_installed() -> None:
    """The adapters exist, but their frameworks cannot be imported. Here our package is imported before torch."""
    script = """
import sys
BLOCKED = {"deepspeed", "transformers", "accelerate", "datasets"}
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Blocker())
import shampoo_deepspeed
import torch
weight = torch.nn.Parameter(torch.ones(4, 4))
optimizer = torch.optim.Shampoo([weight], precondition_frequency=1)
weight.grad = torch.eye(4)
optimizer.step()
assert not torch.equal(weight, torch.ones(4, 4))
optimizer.load_state_dict(optimizer.state_dict())
assert BLOCKED.isdisjoint(sys.modules)
print("done")
"""
    assert run(script) == "done"


def test_the_hook_imports_nothing_but_itself() -> None:
    """So users of torch cannot notice the time that it takes, even if torch or this package grow.

    Stand-ins replace torch's modules, so that torch's own imports are not counted; the hook needs no more.
    """
    script = """
import importlib, importlib.metadata, os, sys, types, typing
sys.modules["torch"] = types.ModuleType("torch")
optim = sys.modules["torch.optim"] = types.ModuleType("torch.optim")
before = set(sys.modules)
from shampoo_deepspeed._autoload import autoload
autoload()
assert callable(optim.__getattr__)
print(*sorted(set(sys.modules) - before))
"""
    assert run(script).split() == ["shampoo_deepspeed", "shampoo_deepspeed._autoload"]


def test_registering_twice_is_registering_once() -> None:
    import torch

    hook = torch.optim.__getattr__
    shampoo_deepspeed.register()
    assert torch.optim.__getattr__ is hook


def test_another_packages_hook_is_still_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def other(name: str) -> object:
        if name == "TheirOptimizer":
            return "theirs"
        raise AttributeError(name)

    monkeypatch.setattr(torch.optim, "__getattr__", other, raising=False)
    shampoo_deepspeed.register()
    assert torch.optim.TheirOptimizer == "theirs"  # type: ignore[attr-defined]
    assert torch.optim.Shampoo is shampoo_deepspeed.Shampoo  # type: ignore[attr-defined]
    with pytest.raises(AttributeError):
        torch.optim.NobodysOptimizer  # type: ignore[attr-defined]  # noqa: B018


def test_the_package_gives_its_names_lazily_and_no_others() -> None:
    for name in shampoo_deepspeed.__all__:
        assert getattr(shampoo_deepspeed, name) is not None
    with pytest.raises(AttributeError, match="module 'shampoo_deepspeed' has no attribute 'Shampo'"):
        shampoo_deepspeed.Shampo  # noqa: B018
