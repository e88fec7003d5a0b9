"""What users install: a wheel and a source distribution that work without the checkout, and editable installations
that do no harm when theirs is deleted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import shampoo_deepspeed

ROOT = Path(__file__).parents[2]
BUILT_FROM = (
    "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "MANIFEST.in", "README.md", "SECURITY.md",
    "constraints.txt", "pyproject.toml", "setup.cfg",
)  # fmt: skip
FOLDERS = ("build_backend", "shampoo_deepspeed", "integrations")
INSTALLED = ROOT / ".ci" / "try_installed.py"

pytestmark = pytest.mark.slow


def run(*command: str | Path, cwd: Path) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd, env=env, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def tree(folder: Path) -> Path:
    """A copy of what the distributions are built from, so that the checkout stays as it is."""
    copy = folder / "tree"
    copy.mkdir()
    for name in BUILT_FROM:
        shutil.copy(ROOT / name, copy)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def built(kind: str, folder: Path) -> Path:
    """A distribution, made without a network by the backend that pyproject.toml names."""
    copy = tree(folder)
    script = (
        f"import sys; sys.path.insert(0, 'build_backend'); import shampoo_build as b; b.build_{kind}({str(folder)!r})"
    )
    run(sys.executable, "-c", script, cwd=copy)
    (path,) = [path for path in folder.iterdir() if path.suffix in (".whl", ".gz")]
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("sdist", tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch and all else that is installed here, without this package."""
    folder = tmp_path_factory.mktemp("others")
    for path in reversed([Path(entry) for entry in sys.path if entry.endswith("site-packages")]):
        for found in path.iterdir():
            link = folder / found.name
            if "shampoo" not in found.name and found.suffix != ".pth":
                link.unlink(missing_ok=True)
                link.symlink_to(found)
    return folder


def environment(folder: Path, others: Path) -> Path:
    """The interpreter of a new environment in which nothing of ours is installed."""
    venv.create(folder, symlinks=True)
    (site_packages,) = folder.glob("lib/python3*/site-packages")
    (site_packages / "others.pth").write_text(f"{others}\n")
    return folder / "bin" / "python"


def install(python: Path, distribution: Path, *, editable: bool = False) -> None:
    """By pip, without a network; a source distribution and a checkout are built first."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", *(["-e"] if editable else [])]
    run(python, "-m", "pip", "install", *options, distribution, cwd=distribution.parent)


def test_a_wheel_has_every_module_of_the_tree_and_the_type_marker(wheel: Path) -> None:
    packaged = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    core = {str(path.relative_to(ROOT)) for path in (ROOT / "shampoo_deepspeed").rglob("*.py")}
    adapters = {f"shampoo_deepspeed/{path.relative_to(ROOT)}" for path in (ROOT / "integrations").rglob("*.py")}
    assert packaged == core | adapters | {"shampoo_deepspeed/py.typed"}


def test_its_metadata_has_the_version_of_the_package_and_the_entry_points(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    names = {name.rpartition("/")[2]: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = Parser().parsestr(archive.read(names["METADATA"]).decode())
    assert metadata["Name"] == "shampoo-deepspeed" and metadata["Version"] == shampoo_deepspeed.__version__
    entry_points = archive.read(names["entry_points.txt"]).decode()
    assert "shampoo_deepspeed._autoload:autoload" in entry_points
    assert "[torch.backends]" in entry_points and "[shampoo_deepspeed.frameworks]" in entry_points


def test_a_source_distribution_has_what_it_is_built_with(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {*BUILT_FROM, "build_backend/shampoo_build.py", "shampoo_deepspeed/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "docs", ".ci"))]


def test_the_package_index_can_show_the_description(wheel: Path, sdist: Path) -> None:
    text = run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist, cwd=wheel.parent)
    assert text.count("PASSED") == 2, text


@pytest.mark.parametrize("kind", ["wheel", "sdist"])
def test_it_works_without_the_checkout(kind: str, others: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Import, torch's hook, one step, the planner, and the marker that lets type checkers look in."""
    python = environment(tmp_path / "env", others)
    install(python, request.getfixturevalue(kind))
    found = json.loads(run(python, INSTALLED, cwd=tmp_path).splitlines()[-1])
    assert Path(found["package"]).is_relative_to(tmp_path / "env")
    assert found["version"] == shampoo_deepspeed.__version__ and found["hook"] and found["typed"]


def test_an_editable_installation_whose_checkout_is_gone_lets_torch_be_imported(others: Path, tmp_path: Path) -> None:
    """torch raises if an entry point of its group cannot be loaded. Nothing is printed; who asks is told why."""
    checkout, python = tree(tmp_path), environment(tmp_path / "env", others)
    install(python, checkout, editable=True)
    ask = "import torch; print(getattr(torch.optim, 'Shampoo', None)); torch.optim.Adam; torch.optim.Shampoo"

    def without_it() -> str:
        done = subprocess.run([python, "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=False)
        lines = done.stderr.strip().splitlines()
        assert done.returncode == 1 and done.stdout == "None\n", done
        assert [line for line in lines if line.startswith(("Traceback", "AttributeError"))] == [lines[0], lines[-1]]
        assert "the checkout that shampoo-deepspeed was installed from cannot be imported" in lines[-1]
        return lines[-1]

    assert run(python, "-c", "import torch; print(torch.optim.Shampoo.__module__)", cwd=tmp_path).split() == [
        "shampoo_deepspeed.optimizer"
    ]
    hook = checkout / "shampoo_deepspeed" / "_autoload.py"
    text = hook.read_text()
    hook.write_text("<<<<<<< HEAD\n")
    assert "SyntaxError" in without_it()
    hook.write_text(text)
    checkout.rename(tmp_path / "moved")
    assert "ModuleNotFoundError" in without_it()
    (checkout / "shampoo_deepspeed" / "__pycache__").mkdir(parents=True)
    assert "ModuleNotFoundError" in without_it()
    shutil.rmtree(checkout)
    assert "ModuleNotFoundError" in without_it()
