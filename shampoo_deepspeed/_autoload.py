"""Makes `torch.optim.Shampoo` resolve lazily; torch calls `autoload` at the end of `import torch`.

torch loads every entry point of the group ``torch.backends`` when it is imported. DeepSpeed looks the optimizer's
JSON type up on ``torch.optim``, so this is all that an unmodified script needs. Nothing is imported until the name
is asked for. ``SHAMPOO_DEEPSPEED_AUTOLOAD=0`` switches the hook off, ``TORCH_DEVICE_BACKEND_AUTOLOAD=0`` all of them;
``shampoo_deepspeed.register()`` works all the same.
"""

import os
import sys

_NAMES = ("Shampoo", "shampoo")


def autoload() -> None:
    """The entry point. any exception here becomes a failed `import torch`, so it does next to nothing."""
    if os.environ.get("SHAMPOO_DEEPSPEED_AUTOLOAD", "1") != "0":
        register()


def register() -> None:
    """Make ``torch.optim.Shampoo`` (and ``shampoo``) give our class; does nothing a second time."""
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
