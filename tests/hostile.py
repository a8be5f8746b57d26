"""What property tests of readers share: the same examples in every run, and files with any damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from minicpm_megatron.errors import UserError

Edit = tuple[int, bytes, int]

# Derandomised, so that a failure is the change's and not the day's. Fixtures may be shared between examples, since each
# example puts back what it has changed.
EXAMPLES = settings(
    max_examples=50,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
# place, what stands there instead, and how much the file grows or is cut
EDITS: st.SearchStrategy[Edit] = st.tuples(
    st.integers(0, 1 << 20), st.binary(min_size=1, max_size=6), st.sampled_from([0, 0, 0, -1, -60, 9])
)


def damaged(content: bytes, edit: Edit) -> bytes:
    """`content` with one of `EDITS`."""
    place, patch, growth = edit
    place %= len(content)
    changed = content[:place] + patch + content[place + len(patch) :]
    return changed[:growth] if growth < 0 else changed + bytes(growth)


class Changed:
    """A file that is changed for the time of one example."""

    def __init__(self, path: Path) -> None:
        self._path, self._before = path, path.read_bytes()

    def __enter__(self) -> Path:
        return self._path

    def __exit__(self, *_: object) -> None:
        self._path.write_bytes(self._before)


def check_line(error: UserError | pytest.ExceptionInfo[UserError], place: Path) -> None:
    """A refusal is one line that names a file in `place`."""
    line = str(error.value if isinstance(error, pytest.ExceptionInfo) else error)
    assert str(place) in line and "\n" not in line, line
