"""Makes `torch.optim.Shampoo` resolve lazily; torch calls `autoload` at the end of `import torch`.

torch loads every entry point of the group ``torch.backends`` when it is imported. DeepSpeed looks the optimizer's
JSON type up on ``torch.optim``, so this is all that an unmodified script needs. Nothing is imported until the name
is used. ``SHAMPOO_DEEPSPEED_AUTOLOAD=0`` switches this hook off, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` all hooks.
``shampoo_deepspeed.register()`` works in any case.
"""

import os
import sys

_NAMES = ("Shampoo", "shampoo")


def autoload() -> None:
    """The entry point. Any exception here makes `import torch` fail, so it does as little as possible."""
    if os.environ.get("SHAMPOO_DEEPSPEED_AUTOLOAD", "1") != "0":
        register()


def register() -> None:
    """Make ``torch.optim.Shampoo`` (and ``shampoo``) resolve to our class; later calls do nothing."""
    import torch.optim  # noqa: F401  (a script may import us before torch)

    optim = sys.modules["torch.optim"]
    if getattr(optim.__dict__.get("__getattr__"), "_shampoo_deepspeed", False):
        return
    previous = optim.__dict__.get("__getattr__")

    def __getattr__(name: str) -> object:
        if name in _NAMES:
            from shampoo_deepspeed.optimizer import Shampoo

            return Shampoo
        if previous is not None:
            return previous(name)
        raise AttributeError(f"module 'torch.optim' has no attribute {name!r}")

    __getattr__._shampoo_deepspeed = True  # type: ignore[attr-defined]
    optim.__getattr__ = __getattr__  # type: ignore[method-assign]
