"""Turns the repository's own pages into the site; mkdocs calls the functions whose names begin with `on_`.

The README, CONTRIBUTING.md and CHANGELOG.md become pages. A link to a file outside docs/ leads to a page that shows
this file; if the link's text is the name of a function or class in it, it leads to the line of its definition. A link
that leads nowhere is an error. mkdocs is imported only inside the functions that it calls.
"""

from __future__ import annotations

import ast
import posixpath
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Files outside docs/ that are pages of the site like those in docs/.
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
# Where mkdocstrings finds the package as it is installed: the adapters are a subpackage.
PACKAGE = ROOT / "build" / "docs_package" / "shampoo_deepspeed"

FENCE = re.compile(r"^(```|~~~).*?^\1$", re.MULTILINE | re.DOTALL)
QUOTED = re.compile(r"(?<!`)``(?!`).+?(?<!`)``(?!`)")  # a link in it is an example
LINK = re.compile(r"(?:\[(?P<text>[^\[\]]*))?\]\((?P<target>[^)\s]+)\)")
NAME = re.compile(r"`(?P<name>[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)`")
PICTURE = re.compile(
    r'<picture>\s*<source[^>]*srcset="(?P<dark>[^"]+)"[^>]*>\s*'
    r'<img alt="(?P<alt>[^"]+)" src="(?P<light>[^"]+)"[^>]*>\s*</picture>'
)
FETCHED = re.compile(r"<(?:script|link|img|source|iframe)\b[^>]*\b(?:src|srcset|href)=[\"']?https?://[^>]*>")
TITLES: dict[str, str] = {}  # of pages, by mkdocs.yml
LANGUAGES = {".py": "python", ".json": "json", ".yaml": "yaml", ".cfg": "ini", ".toml": "toml"}


class LinkError(ValueError):
    """A link that leads nowhere; the message names the page and the link."""


def page_of(path: str) -> str:
    """Return the site's page for a file of the repository, both as paths with slashes."""
    if path in ROOT_PAGES:
        return ROOT_PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}" if path.endswith(".md") else f"source/{path}.md"


def target_of(link: str, path: str) -> tuple[str, str]:
    """Return the file that a link on the page `path` leads to, and the anchor in it; for a folder, its README."""
    file, _, anchor = link.partition("#")
    found = posixpath.normpath(posixpath.join(posixpath.dirname(path), file)) if file else path
    if (ROOT / found).is_dir():
        found += "/README.md"
    if found.startswith("..") or not (ROOT / found).is_file():
        raise LinkError(f"{path}: the link {link} leads nowhere")
    return found, anchor


def links(text: str) -> Iterator[re.Match[str]]:
    """Yield the links within the repository, outside code blocks."""
    code = [match.span() for pattern in (FENCE, QUOTED) for match in pattern.finditer(text)]
    for match in LINK.finditer(text):
        inside = any(start <= match.start() < stop for start, stop in code)
        if not inside and not match["target"].startswith(("https://", "http://")):
            yield match


def line_of(name: str, file: str) -> int:
    """Return the line at which a Python file defines `name`, `Class.name`, or the only `name` of any class."""

    def definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, int]]:
        for node in body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                yield prefix + node.name, node.lineno
                yield from definitions(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.Assign):
                yield from ((prefix + t.id, node.lineno) for t in node.targets if isinstance(t, ast.Name))

    known = dict(definitions(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, ""))
    found = [known[name]] if name in known else [at for full, at in known.items() if full.endswith(f".{name}")]
    if len(found) != 1:
        raise LinkError(f"a link is named {name}, which {file} defines {len(found)} times")
    return found[0]


def rewritten(text: str, path: str) -> str:
    """Return a page's text with links as mkdocs needs them."""
    here = posixpath.dirname(page_of(path))

    def relative(link: str) -> str:
        file, anchor = target_of(link, path)
        return posixpath.relpath(page_of(file), here or ".") + (f"#{anchor}" if anchor else "")

    pieces, done = [], 0
    for match in links(text):
        target = match["target"]
        if target.startswith("#"):
            continue
        name = NAME.fullmatch(match["text"] or "")
        file, anchor = target_of(target, path)
        if name and file.endswith(".py") and not anchor and not name["name"].endswith(".py"):
            new = f"{relative(target)}#__span-0-{line_of(name['name'], file)}"
        else:
            new = relative(target)
        if page_of(file) in TITLES and match["text"] in (file, posixpath.basename(file)):  # a title reads better
            pieces += [text[done : match.start("text")], TITLES[page_of(file)]]
            done = match.end("text")
        pieces += [text[done : match.start("target")], new]
        done = match.end("target")
    text = "".join([*pieces, text[done:]])
    # The site's own switch chooses between light and dark, not only the browser's setting.
    return PICTURE.sub(
        lambda m: f"![{m['alt']}]({relative(m['light'])}#only-light)\n![{m['alt']}]({relative(m['dark'])}#only-dark)",
        text,
    )


def pages() -> list[str]:
    """Return the site's pages as files of the repository, without those that only show a file."""
    return [*ROOT_PAGES, *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))]


def shown_files() -> list[str]:
    """Return the files that are shown because a page links to them; Markdown files among them have links too."""
    known = set(pages())
    waiting, shown = list(known), set()
    while waiting:
        path = waiting.pop()
        for match in links((ROOT / path).read_text(encoding="utf-8")):
            file, _ = target_of(match["target"], path)
            if file not in known and not file.startswith("docs/"):
                known.add(file)
                shown.add(file)
                waiting += [file] if file.endswith(".md") else []
    return sorted(shown)


def listing(path: str) -> str:
    """Return a page that shows a source file, with numbered lines."""
    code = (ROOT / path).read_text(encoding="utf-8")
    language = LANGUAGES.get(Path(path).suffix, "text")
    front = f"---\ntitle: {Path(path).name}\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n"
    return f'{front}# `{path}`\n\n~~~~ {{ .{language} linenums="1" }}\n{code}\n~~~~\n'


def titles(navigation: list[Any]) -> Iterator[tuple[str, str]]:
    """Yield pages and their titles."""
    for item in navigation:
        for title, target in item.items():
            yield from titles(target) if isinstance(target, list) else [(target, title)]


def on_startup(**_: Any) -> None:
    """Lay out the package as it is installed, before mkdocstrings looks for it."""
    shutil.rmtree(PACKAGE, ignore_errors=True)
    shutil.copytree(ROOT / "shampoo_deepspeed", PACKAGE, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "integrations", PACKAGE / "integrations", ignore=shutil.ignore_patterns("__pycache__"))


def on_config(config: Any) -> None:
    """Store the titles of pages."""
    TITLES.update(titles(config.nav))


def on_files(files: Any, config: Any) -> None:
    """Add the pages that are not in docs/."""
    from mkdocs.structure.files import File

    for path in [*ROOT_PAGES, *shown_files()]:
        text = (ROOT / path).read_text(encoding="utf-8") if path.endswith(".md") else listing(path)
        files.append(File.generated(config, page_of(path), content=text))


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page. A page that is alone in its section needs no list of the section's pages."""
    if page.parent is None:
        page.meta.setdefault("hide", ["navigation"])
    sources = {page_of(path): path for path in [*ROOT_PAGES, *shown_files()]}
    path = sources.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return rewritten(markdown, path) if path.endswith(".md") else markdown


def on_page_content(html: str, page: Any, config: Any, files: Any) -> None:
    """Tell mkdocs, which checks anchors, about the lines of a shown file."""
    if page.file.src_uri.startswith("source/"):
        page.present_anchor_ids |= set(re.findall(r'id="(__span-[\d-]+)"', html))


def on_post_page(output: str, page: Any, config: Any) -> None:
    """Refuse a page that would fetch something from another server when it is read."""
    from mkdocs.exceptions import PluginError

    if fetched := FETCHED.findall(output):
        raise PluginError(f"{page.file.src_uri} fetches from another server: {fetched}")
