"""How the tests of preprocessing call it, in this process and as the tool."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from minicpm_megatron.data.metadata import TokenMetadata
from minicpm_megatron.data.preprocess import Options, preprocess

REPOSITORY = Path(__file__).resolve().parents[2]
TOOL = [sys.executable, str(REPOSITORY / "tools" / "preprocess_data.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}


def contents(prefix: Path) -> dict[str, bytes]:
    """The four files of an output."""
    return {suffix: Path(f"{prefix}.{suffix}").read_bytes() for suffix in ("bin", "idx", "json", "rejected.jsonl")}


def run(inputs: list[Path], tokenizer: Path, prefix: Path, workers: int = 1, **options: Any) -> TokenMetadata:
    return preprocess(
        [str(path) for path in inputs],
        tokenizer,
        prefix,
        workers=workers,
        options=Options(**options),
        show_progress=False,
    )


def tool(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*TOOL, *map(str, arguments)], env=ENVIRONMENT, capture_output=True, text=True, **options)
