"""The build backend: setuptools', with editable installations that a deleted checkout does not turn into a trap.

torch loads every entry point of the group ``torch.backends`` when it is imported, and fails if one cannot be loaded.
An editable installation leaves this entry point behind when its checkout is deleted or moved. So an editable wheel gets
a hook of its own, which lies next to torch and not in the checkout. If the checkout is gone, torch is imported as if
nothing were installed, and only who asks for ``torch.optim.Shampoo`` gets to know why it is missing.
"""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the other hooks are setuptools')

HOOK = "__editable___shampoo_deepspeed_hook"
TARGET = "shampoo_deepspeed._autoload:autoload"
SOURCE = '''"""torch's hook of an editable installation: whatever has become of the checkout, torch is imported."""

import os
import sys


def autoload():
    if os.environ.get("SHAMPOO_DEEPSPEED_AUTOLOAD", "1") == "0":
        return
    try:
        from shampoo_deepspeed._autoload import autoload as hook
    except Exception as error:  # gone, moved, of another user, or half edited: each raises something else
        _explain_later(error)
    else:
        hook()


def _explain_later(error):
    """Say nothing before somebody asks for the optimizer."""
    why = (
        "torch.optim.Shampoo is missing, as the checkout that shampoo-deepspeed was installed from cannot be imported "
        f"({type(error).__name__}: {error}): install it again, or `pip uninstall shampoo-deepspeed`"
    )
    optim = sys.modules["torch.optim"]
    previous = optim.__dict__.get("__getattr__")

    def __getattr__(name):
        if name in ("Shampoo", "shampoo"):
            raise AttributeError(why)
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")

    optim.__getattr__ = __getattr__
'''


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Any = None) -> str:
    name = build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)
    entry_points = Path(metadata_directory, name, "entry_points.txt")
    entry_points.write_text(_redirected(entry_points.read_text(encoding="utf-8")), encoding="utf-8")
    return name


def build_editable(wheel_directory: str, config_settings: Any = None, metadata_directory: str | None = None) -> str:
    name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    _add_hook(Path(wheel_directory, name))
    return name


def _redirected(entry_points: str) -> str:
    """The entry points with the hook of editable installations in place of the package's own."""
    redirected = entry_points.replace(TARGET, f"{HOOK}:autoload")
    if f"{HOOK}:autoload" not in redirected:
        raise RuntimeError(f"setup.cfg lists no entry point {TARGET}")
    return redirected


def _add_hook(wheel: Path) -> None:
    """Write a wheel again with the hook in it."""
    with zipfile.ZipFile(wheel) as old:
        contents = {name: old.read(name) for name in old.namelist()}
    (entry_points,) = [name for name in contents if name.endswith(".dist-info/entry_points.txt")]
    (record,) = [name for name in contents if name.endswith(".dist-info/RECORD")]
    contents[entry_points] = _redirected(contents[entry_points].decode()).encode()
    del contents[record]
    contents[f"{HOOK}.py"] = SOURCE.encode()
    lines = [f"{name},sha256={_digest(content)},{len(content)}" for name, content in contents.items()]
    contents[record] = "\n".join([*lines, f"{record},,", ""]).encode()
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in contents.items():
            new.writestr(name, content)


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
