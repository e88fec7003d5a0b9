"""Importing this module makes ``optim="shampoo"`` known to Transformers; running it does so for an untouched script.

For TRL, LLaMA-Factory and other packages that read ``TrainingArguments``::

    python -m shampoo_deepspeed.integrations.optim_shampoo train.py --optim shampoo
    torchrun --nproc_per_node 8 -m shampoo_deepspeed.integrations.optim_shampoo -m llamafactory.launcher train.yaml
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .trainer import register_with_transformers

USAGE = "usage: python -m shampoo_deepspeed.integrations.optim_shampoo (SCRIPT.py | -m MODULE) [ARGUMENT ...]"


def main(arguments: Sequence[str]) -> None:
    """Run a script or, after ``-m``, a module with its arguments, as Python itself would.

    Raises:
        SystemExit: with the usage, if neither is named.
    """
    is_module = arguments[:1] == ["-m"]
    command = arguments[is_module:]
    if not command or command[0].startswith("-"):
        raise SystemExit(USAGE)
    sys.argv[:] = command
    if is_module:
        runpy.run_module(command[0], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(command[0]).resolve().parent)  # where Python looks for what a script imports
    runpy.run_path(command[0], run_name="__main__")


register_with_transformers()
if __name__ == "__main__":
    main(sys.argv[1:])
