"""Tries an installed package, in an environment and a directory that know nothing of a checkout; prints what it found.

Run by tests/project/test_wheel.py, and by .ci/try_wheel with other Python versions.
"""

import importlib.resources
import json
import platform
import subprocess
import sys

import torch

hook = hasattr(torch.optim, "Shampoo")  # before any import of ours

import shampoo_deepspeed  # noqa: E402
from shampoo_deepspeed import Shampoo  # noqa: E402

model = torch.nn.Linear(6, 4)
before = model.weight.detach().clone()
optimizer = Shampoo(model.named_parameters(), lr=0.1, precondition_frequency=1)
model(torch.ones(2, 6)).sum().backward()
optimizer.step()
assert not torch.equal(before, model.weight)

arguments = ["estimate", "--model", "llama-3.2-1b", "--world-size", "8", "--framework", "zero3"]
command = [sys.executable, "-m", "shampoo_deepspeed", *arguments]
table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
assert "all optimizer state" in table, table

found = {
    "python": platform.python_version(),
    "torch": torch.__version__,
    "package": shampoo_deepspeed.__file__,
    "version": shampoo_deepspeed.__version__,
    "hook": hook,
    "typed": (importlib.resources.files("shampoo_deepspeed") / "py.typed").is_file(),
}
print(json.dumps(found))
