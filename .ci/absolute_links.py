"""Makes the relative links of a page absolute, for PyPI, which shows the README apart from its files.

    python .ci/absolute_links.py README.md https://github.com/OWNER/NAME v0.1.0

Links lead to the files of a tag, pictures to their contents. A tag that is not the version is an error.
"""

import re
import runpy
import sys
from pathlib import Path

LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s]+)(?=\))")
PICTURE = re.compile(r'(?<=src=")(?!https?://)([^"]+)(?=")|(?<=srcset=")(?!https?://)([^"]+)(?=")')
VERSION = runpy.run_path(str(Path(__file__).parents[1] / "shampoo_deepspeed" / "_version.py"))["__version__"]


def absolute(text: str, repository: str, tag: str) -> str:
    """A page's text with absolute links."""
    text = LINK.sub(lambda found: f"{repository}/blob/{tag}/{found[0]}", text)
    return PICTURE.sub(lambda found: f"{repository}/raw/{tag}/{found[0]}", text)


def main(page: str, repository: str, tag: str) -> None:
    if tag != f"v{VERSION}":
        sys.exit(f"the tag {tag} is not v{VERSION}, the version in shampoo_deepspeed/_version.py")
    path = Path(page)
    path.write_text(absolute(path.read_text(encoding="utf-8"), repository.rstrip("/"), tag), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
