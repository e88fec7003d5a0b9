"""Shampoo for DeepSpeed ZeRO and the Hugging Face Trainer: exact under every sharding, one line to switch on.

Importing the package registers ``torch.optim.Shampoo`` (which DeepSpeed's JSON looks up), unless the environment
variable ``SHAMPOO_DEEPSPEED_AUTOLOAD`` is 0. All other public names are imported when the first of them is used.
"""

from typing import TYPE_CHECKING, Any

from shampoo_deepspeed._autoload import autoload, register

if TYPE_CHECKING:
    from shampoo_deepspeed._version import __version__ as __version__
    from shampoo_deepspeed.checkpoint import load_shampoo, save_shampoo, wait_for_saves
    from shampoo_deepspeed.checkpoint.errors import CheckpointError
    from shampoo_deepspeed.distributed.frameworks import LayoutError
    from shampoo_deepspeed.optimizer import Shampoo
    from shampoo_deepspeed.options.checks import OptionError
    from shampoo_deepspeed.options.config import ShampooConfig
    from shampoo_deepspeed.state.unwrap import unwrap

__all__ = [
    "CheckpointError",
    "LayoutError",
    "OptionError",
    "Shampoo",
    "ShampooConfig",
    "load_shampoo",
    "register",
    "save_shampoo",
    "unwrap",
    "wait_for_saves",
]

_HOMES = {
    "__version__": "shampoo_deepspeed._version",
    "Shampoo": "shampoo_deepspeed.optimizer",
    "ShampooConfig": "shampoo_deepspeed.options.config",
    "OptionError": "shampoo_deepspeed.options.checks",
    "LayoutError": "shampoo_deepspeed.distributed.frameworks",
    "CheckpointError": "shampoo_deepspeed.checkpoint.errors",
    "load_shampoo": "shampoo_deepspeed.checkpoint",
    "save_shampoo": "shampoo_deepspeed.checkpoint",
    "unwrap": "shampoo_deepspeed.state.unwrap",
    "wait_for_saves": "shampoo_deepspeed.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    # All names at once, so that no later call passes here; but the version must cost no import of torch.
    found = [name] if name == "__version__" else [public for public in _HOMES if public != "__version__"]
    globals().update({public: getattr(import_module(_HOMES[public]), public) for public in found})
    return globals()[name]


# torch's hook imports this package to find its function, so the variable that switches it off must apply here too.
autoload()
