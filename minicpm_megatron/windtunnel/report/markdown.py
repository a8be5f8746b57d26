"""The report as Markdown, with links to the pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from minicpm_megatron.windtunnel.report.facts import count_verdicts, facts, verdict
from minicpm_megatron.windtunnel.results import Results

SUMMARY = ("experiment", "claim", "paper", "ours", "verdict")


def format_markdown(all_results: Sequence[tuple[Path, Results]], base: Path) -> str:
    """Several experiments as one Markdown page whose pictures are linked relative to `base`."""
    lines = ["# Wind tunnel", "", f"{count_verdicts([results for _, results in all_results])}.", ""]
    claims = [
        (results.kind, each.claim, each.paper, each.ours, verdict(each.agrees))
        for _, results in all_results
        for each in results.findings
    ]
    lines += _table(SUMMARY, claims)
    for folder, results in all_results:
        lines += ["", f"## {results.title}", ""]
        lines += [f"- {what}: {text}" for what, text in facts(results)]
        for table in results.tables:
            lines += ["", table.title, "", *_table(table.columns, table.rows)]
        for picture in results.pictures:
            place = os.path.relpath((folder / picture.file).resolve(), base.resolve())
            lines += ["", f"![{picture.caption}]({place})"]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield _row(columns)
    yield "| --- " * len(columns) + "|"
    yield from map(_row, rows)


def _row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|").replace("\n", " ") for text in texts) + " |"
