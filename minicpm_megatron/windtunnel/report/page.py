"""The report as a file, in the form that its name asks for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.windtunnel.report.html_page import format_html
from minicpm_megatron.windtunnel.report.markdown import format_markdown
from minicpm_megatron.windtunnel.results import Results


def write_page(found: Sequence[tuple[Path, Results]], path: Path) -> None:
    """Write experiments, (folder, results) of each, as one page: .html with pictures inside, .md with links to them.

    Raises:
        UserError: another suffix, a folder that is not there, or a picture that is missing.
    """
    if path.suffix not in (".html", ".md"):
        raise UserError("not a page that can be written", where=str(path), fix="end it in .html or .md")
    if not path.resolve().parent.is_dir() or path.is_dir():
        raise UserError("cannot be written", where=str(path), fix="give a file in a folder that exists")
    page = format_html(found) if path.suffix == ".html" else format_markdown(found, path.parent)
    write_bytes(path, page.encode())
