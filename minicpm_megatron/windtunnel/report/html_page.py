"""The report as one HTML file with its pictures inside, which can be mailed, archived or put on a server as it is."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.windtunnel.report.facts import count_verdicts, facts, verdict
from minicpm_megatron.windtunnel.results import Picture, Results

TEMPLATE = "page.html.j2"


def format_html(all_results: Sequence[tuple[Path, Results]]) -> str:
    """Several experiments as one page; whatever stands in results.json is shown as text, never as markup.

    Raises:
        UserError: a picture is missing.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    experiments = [
        {
            "results": results,
            "facts": facts(results),
            "pictures": [(_inline(folder, picture), picture.caption) for picture in results.pictures],
        }
        for folder, results in all_results
    ]
    summary = count_verdicts([results for _, results in all_results])
    return environment.get_template(TEMPLATE).render(experiments=experiments, summary=summary, verdict=verdict)


def _inline(folder: Path, picture: Picture) -> str:
    path = folder / picture.file
    try:
        content = path.read_bytes()
    except OSError as error:
        fix = "start the experiment again: it draws its pictures anew"
        raise UserError(f"picture cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
