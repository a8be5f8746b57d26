"""Progress bars that are readable both on a terminal and in a log file."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

# a log file gets one line in this many seconds, a terminal is redrawn twice a second
_LOG_SECONDS, _TERMINAL_SECONDS = 15.0, 0.5


def progress_bar(**options: Any) -> tqdm:
    """A tqdm bar on standard error with rate and remaining time."""
    seconds = _TERMINAL_SECONDS if sys.stderr.isatty() else _LOG_SECONDS
    return tqdm(mininterval=seconds, maxinterval=seconds, dynamic_ncols=True, **options)
