"""The texts as they are in Debian packages: pairs of a dictionary, pages of a handbook, prose of a lexicon."""

from __future__ import annotations

import gzip
import re
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGES = {
    "dict-freedict-eng-deu": "usr/share/dictd/freedict-eng-deu.dict.dz",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US",
    "dict-jargon": "usr/share/dictd/jargon.dict.dz",
}
# A headword with its pronunciation between slashes, and the line that follows it.
ENTRY = re.compile(r"^(?P<english>[^\n/]+) /[^\n/]+/(?: <[^>\n]*>)*\n(?P<german>[^\n]+)$", re.MULTILINE)
REMARK = re.compile(r" ?[<\[(][^>\])]*[>\])]")
LONGEST = 40  # characters of a headword, and of its translation
# Elements of a page that begin a new paragraph, and those that are not the text of the book.
BLOCKS = {"div", "p", "pre", "h1", "h2", "h3", "h4", "li", "dt", "dd", "tr"}
SKIPPED = {"head", "script", "style", "ul.docnav", "p#title", "div#banner"}


def unpacked(data: Path | None, cache: Path) -> Path:
    """The folder under which all packages are unpacked.

    Raises:
        FileNotFoundError: if the folder that was given lacks one, or none was given and there is no apt-get.
    """
    folder = cache / "packages" if data is None else data
    missing = [name for name, path in PACKAGES.items() if not (folder / path).exists()]
    if not missing:
        return folder
    if data is not None or shutil.which("apt-get") is None:
        raise FileNotFoundError(f"{folder} lacks the Debian packages {', '.join(missing)}: `dpkg -x` unpacks one")
    with TemporaryDirectory() as temporary:
        subprocess.run(["apt-get", "--quiet=2", "download", *missing], cwd=temporary, check=True)
        folder.mkdir(parents=True, exist_ok=True)
        for file in sorted(Path(temporary).glob("*.deb")):
            subprocess.run(["dpkg", "-x", str(file), str(folder)], check=True)
    return folder


def translations(root: Path) -> list[tuple[str, str]]:
    """English headwords and their first German translations, without remarks, in the order of the dictionary."""
    return list(dict.fromkeys(pairs_of(_read(root / PACKAGES["dict-freedict-eng-deu"]))))


def pairs_of(text: str) -> Iterator[tuple[str, str]]:
    """Pairs of a text in the form of FreeDict; what is long or has no letters is left out."""
    for found in ENTRY.finditer(text):
        english = found["english"].strip()
        german = REMARK.sub("", found["german"]).split(",")[0].split(";")[0].strip()
        if 1 < len(english) <= LONGEST and 1 < len(german) <= LONGEST and german[0].isalpha() and english[0].isalpha():
            yield english, german


def pages(root: Path) -> list[tuple[str, str]]:
    """Name and text of each page of the handbook, by name."""
    folder = root / PACKAGES["debian-handbook"]
    return [(file.name, text_of(file.read_text(encoding="utf-8"))) for file in sorted(folder.glob("*.html"))]


class _Paragraphs(HTMLParser):
    """Collects the paragraphs of a page; markup and navigation are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[list[str]] = [[]]
        self._open: list[tuple[str, bool]] = []  # elements around, and whether each is skipped

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        kind = (own.get("class") or "").split(" ")[0]
        names = {tag, f"{tag}.{kind}", f"{tag}#{own.get('id')}"}
        skipped = not SKIPPED.isdisjoint(names) or bool(self._open) and self._open[-1][1]
        if tag not in {"br", "hr", "img", "meta", "link"}:
            self._open.append((tag, skipped))
        if tag in BLOCKS:
            self.paragraphs.append([])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """An empty element; nothing is within it."""

    def handle_endtag(self, tag: str) -> None:
        if any(name == tag for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass
        if tag in BLOCKS:
            self.paragraphs.append([])

    def handle_data(self, data: str) -> None:
        if not (self._open and self._open[-1][1]):
            self.paragraphs[-1].append(data)


def text_of(page: str) -> str:
    """Headings and paragraphs of a page, without markup, one blank line between them."""
    reader = _Paragraphs()
    reader.feed(page)
    parts = [re.sub(r"\s+", " ", "".join(part)).strip() for part in reader.paragraphs]
    return "\n\n".join(part for part in parts if part)


def lexicon(root: Path) -> str:
    """The entries of the Jargon Lexicon as running text, one paragraph a line."""
    text = _read(root / PACKAGES["dict-jargon"]).split("\n\n", 40)[-1]  # without what describes the database
    paragraphs = re.sub(r"[{}]", "", text).split("\n\n")
    return "\n".join(re.sub(r"\s+", " ", paragraph).strip() for paragraph in paragraphs)


def _read(file: Path) -> str:
    with gzip.open(file, "rt", encoding="utf-8") as stream:
        return stream.read()
