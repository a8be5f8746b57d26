"""mkdocs: pages link to files of the repository as they do on GitHub; those outside docs/ become part of the site.

README.md is the site's first page. A link to a file that does not exist stays as it is, for `mkdocs build --strict` to
refuse.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
START = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
LINK = re.compile(r"(\]\()([^)#:\s]+)((?:#[^)]*)?\))")


def _in_site(path: str) -> str:
    """Path in the repository -> path in the site's sources."""
    if path == "README.md":
        return "index.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def _in_repository(place: str) -> str:
    """The inverse of `_in_site`."""
    if place == "index.md":
        return "README.md"
    return place.removeprefix("repository/") if place.startswith("repository/") else f"docs/{place}"


def _target(page: str, link: str) -> str:
    """Return the path that a link on a page of the repository leads to; for a folder, the path of its README."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return f"{path}/README.md" if (ROOT / path / "README.md").is_file() else path


def on_files(files: Files, *, config: Any) -> Files:
    """Add the files outside docs/ that pages lead to, and those that these lead to."""
    known = {_in_repository(file.src_uri) for file in files}
    to_read = [*START, *(path for path in sorted(known) if path.endswith(".md"))]
    while to_read:
        page = to_read.pop(0)
        if page not in known:
            known.add(page)
            files.append(File.generated(config, _in_site(page), abs_src_path=str(ROOT / page)))
        if page.endswith(".md"):
            found = {_target(page, link) for _, link, _ in LINK.findall((ROOT / page).read_text(encoding="utf-8"))}
            to_read += sorted(path for path in found - known - set(to_read) if (ROOT / path).is_file())
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead every link to where its target is in the site."""
    here = _in_repository(page.file.src_uri)

    def lead(match: re.Match[str]) -> str:
        opening, link, rest = match.groups()
        target = _target(here, link)
        if not (ROOT / target).is_file():
            return match[0]
        return opening + posixpath.relpath(_in_site(target), posixpath.dirname(page.file.src_uri) or ".") + rest

    return LINK.sub(lead, markdown)
