"""What a release needs agrees with itself: versions, the matrix, pins of tools, and the description for PyPI."""

from __future__ import annotations

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

import shampoo_deepspeed

ROOT = Path(__file__).parents[2]
WORKFLOWS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")
}
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def metadata() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def commands(workflow: str) -> str:
    jobs = WORKFLOWS[workflow]["jobs"].values()
    return "\n".join(step["run"] for job in jobs for step in job["steps"] if "run" in step)


def pythons(job: dict[str, Any]) -> list[str]:
    found: list[str] = job["strategy"]["matrix"]["python"]
    return found


def test_the_version_stands_in_one_place() -> None:
    assert metadata()["metadata"]["version"] == "attr: shampoo_deepspeed._version.__version__"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == shampoo_deepspeed.__version__
    assert {"cff-version", "title", "message", "authors", "license"} <= citation.keys()


def test_every_python_of_the_metadata_is_tested() -> None:
    config = metadata()
    assert re.findall(r":: Python :: (3\.\d+)$", config["metadata"]["classifiers"], re.MULTILINE) == PYTHONS
    assert config["options"]["python_requires"] == f">={PYTHONS[0]}"
    jobs = WORKFLOWS["tests"]["jobs"]
    assert pythons(jobs["pinned"]) == pythons(jobs["wheel"]) == PYTHONS
    assert pythons(WORKFLOWS["nightly"]["jobs"]["newest"]) == PYTHONS


def test_both_ends_of_the_versions_are_tested() -> None:
    assert "make test-oldest" in commands("tests") and "make test CONSTRAINTS=/dev/null" in commands("tests")
    assert "make test CONSTRAINTS=/dev/null" in commands("nightly")
    assert "make docs" in commands("docs") and "make lint" in commands("tests")
    oldest = subprocess.run([sys.executable, ROOT / ".ci" / "oldest.py"], capture_output=True, text=True, check=True)
    pins = oldest.stdout.split()
    assert sorted(pin.partition("==")[0] for pin in pins) == [
        "accelerate",
        "deepspeed",
        "safetensors",
        "torch",
        "transformers",
    ]
    for pin in pins:
        assert pin.replace("==", ">=") in (ROOT / "setup.cfg").read_text(encoding="utf-8")


def test_targets_that_workflows_and_pages_name_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    pages = [(ROOT / name).read_text(encoding="utf-8") for name in ("CONTRIBUTING.md", "RELEASING.md", "README.md")]
    quoted = re.findall(r"`(make [a-z-]+)`", "\n".join(pages))
    named = set(re.findall(r"\bmake ([a-z-]+)\b", "\n".join([*map(commands, WORKFLOWS), *quoted])))
    assert {"test", "test-oldest", "test-wheel", "dist"} <= named
    assert [target for target in sorted(named) if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_a_tag_publishes_without_a_token() -> None:
    jobs = WORKFLOWS["publish"]["jobs"]
    assert WORKFLOWS["publish"][True]["push"] == {"tags": ["v*"]}  # YAML reads `on` as true
    assert jobs["publish"]["permissions"] == {"id-token": "write"} and jobs["publish"]["environment"] == "pypi"
    assert jobs["publish"]["needs"] == "build" and "twine check --strict" in commands("publish")
    text = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    assert "secrets." not in text and "password" not in text


def test_what_runs_before_a_commit_is_what_make_lint_runs() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert hooks == [".venv/bin/ruff format", ".venv/bin/ruff check --fix", ".venv/bin/mypy"]
    lint = (ROOT / "Makefile").read_text(encoding="utf-8").partition("\nlint:")[2].partition("\n\n")[0]
    for part in ("ruff check .", "ruff format --check .", "mypy"):
        assert part in lint


def test_links_of_the_readme_lead_somewhere_on_the_package_index(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    script, tag = ROOT / ".ci" / "absolute_links.py", f"v{shampoo_deepspeed.__version__}"
    subprocess.run([sys.executable, script, page, "https://example.com/a/b/", tag], check=True)
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    assert len(links) > 20 and all(link.startswith("https://") for link in links)
    assert f"](https://example.com/a/b/blob/{tag}/docs/start.md" in text
    pictures = re.findall(r'(?:src|srcset)="([^"]+)"', text)
    assert len(pictures) == 2 and all(
        found.startswith(f"https://example.com/a/b/raw/{tag}/docs/") for found in pictures
    )


def test_a_tag_that_is_not_the_version_stops_the_release(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("[a](b.md)")
    script = ROOT / ".ci" / "absolute_links.py"
    done = subprocess.run([sys.executable, script, page, "https://x.org", "v9.9.9"], capture_output=True, text=True)
    assert done.returncode == 1 and "the tag v9.9.9 is not v" in done.stderr and page.read_text() == "[a](b.md)"


@pytest.mark.parametrize("page", ["SECURITY.md", "RELEASING.md", "CITATION.cff", "MANIFEST.in"])
def test_files_that_a_release_needs_are_there(page: str) -> None:
    assert (ROOT / page).is_file()
