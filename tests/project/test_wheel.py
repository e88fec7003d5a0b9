"""What `pip install` gives: a wheel built from the tree has every folder, the type marker and the adapters."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import shampoo_deepspeed

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build the wheel from a copy, without a network, so that the tree stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    tree.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    for name in ("shampoo_deepspeed", "integrations"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_a_wheel_has_every_module_of_the_tree_and_the_type_marker(wheel: zipfile.ZipFile) -> None:
    packaged = {name for name in wheel.namelist() if ".dist-info/" not in name}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "shampoo_deepspeed").rglob("*.py")}
    adapters = {f"shampoo_deepspeed/{path.relative_to(ROOT)}" for path in (ROOT / "integrations").rglob("*.py")}
    assert packaged == core | adapters | {"shampoo_deepspeed/py.typed"}


@pytest.mark.slow
def test_its_metadata_has_the_version_of_the_package_and_the_entry_points(wheel: zipfile.ZipFile) -> None:
    names = {name.rpartition("/")[2]: name for name in wheel.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(wheel.read(names["METADATA"]).decode())
    assert metadata["Name"] == "shampoo-deepspeed" and metadata["Version"] == shampoo_deepspeed.__version__
    entry_points = wheel.read(names["entry_points.txt"]).decode()
    assert "[torch.backends]" in entry_points and "[shampoo_deepspeed.frameworks]" in entry_points
