"""The common state of a torch_dist checkpoint, beside its tensors: iteration, arguments of the run, count of updates.

Megatron-Core 0.19 keeps it as an object among the tensors, earlier releases in `common.pt`. Both are written by
torch.save and read as data.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minicpm_megatron.convert.torch_dist.chunks import check_extent, read_extent
from minicpm_megatron.convert.torch_dist.contents import Contents, is_dtype
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.pickle_as_data import Description
from minicpm_megatron.storage.torch_archive import TorchArchive

COMMON_FILE = "common.pt"
COMMON_OBJECT = "common_state/shard_0_1"
NOTE_KEY = "minicpm_megatron"
# classes of Megatron-Core's own list (core/safe_globals.py in 0.19) and what tensors and arrays are pickled as
_ALLOWED = re.compile(
    r"(minicpm_)?megatron\.[\w.]+"
    r"|argparse\.Namespace|types\.SimpleNamespace|signal\.Signals|pathlib\.(Pure)?(Posix)?Path"
    r"|collections\.(OrderedDict|defaultdict)|_codecs\.encode|_io\.BytesIO"
    r"|builtins\.(set|frozenset|bytearray|complex|range|slice)"
    r"|torch\.(Size|device|\w+Storage|storage\.\w+Storage|(_C\.)?Generator|_(utils|tensor)\._rebuild_\w+)"
    r"|numpy\.(ndarray|dtype|dtypes\.\w+|_?core\.multiarray\.\w+)"
)


@dataclass(frozen=True)
class CommonState:
    """The part of the common state that conversions need; None and empty where the checkpoint lacks it.

    Attributes:
        iteration: steps done.
        updates: steps that the optimizer has counted.
        args: Megatron-LM's arguments; plain values and descriptions.
        note: fields that a conversion of ours has written.
    """

    iteration: int | None = None
    updates: int | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    note: Mapping[str, Any] = field(default_factory=dict)


def read_common_state(folder: Path, contents: Contents) -> CommonState:
    """The common state of a folder, empty where there is none.

    Raises:
        UserError: it is damaged, or names something that Megatron does not save.
    """
    path, extent = folder / COMMON_FILE, contents.objects.get(COMMON_OBJECT)
    if path.is_file():  # Megatron-Core 0.19 prefers it, too
        try:
            with open(path, "rb") as file:
                return _common_state(TorchArchive(file, _allowed, where=str(path)))
        except OSError as error:
            raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    if extent is None:
        return CommonState()
    check_extent(folder, extent)
    content = io.BytesIO(read_extent(folder, extent))
    return _common_state(TorchArchive(content, _allowed, where=f"{folder / extent.file} ({COMMON_OBJECT})"))


def _allowed(name: str) -> bool:
    return is_dtype(name) or _ALLOWED.fullmatch(name) is not None


def _common_state(archive: TorchArchive) -> CommonState:
    state = archive.value
    if isinstance(state, list) and state:  # Megatron-Core saves the objects that a rank has of one name as a list
        state = state[0]
    if not isinstance(state, dict):
        return CommonState()
    args, note = state.get("args"), state.get(NOTE_KEY)
    named = args.state if isinstance(args, Description) else None
    steps = {archive.number(step) for step in _steps(state.get("optimizer"))}
    return CommonState(
        iteration=_count(archive.number(state.get("iteration"))),
        updates=_count(steps.pop()) if len(steps) == 1 else None,
        args=named if isinstance(named, dict) else {},
        note=note if isinstance(note, dict) else {},
    )


def _count(number: float | None) -> int | None:
    return int(number) if number is not None and number >= 0 and number.is_integer() else None


def _steps(optimizer: Any) -> Iterator[Any]:
    """Every place where Megatron-Core's optimizers save their count of steps."""
    if not isinstance(optimizer, dict):
        return
    chained = [value for key, value in optimizer.items() if isinstance(key, int)]
    for each in (optimizer, *chained):
        for part in (each, each.get("optimizer")) if isinstance(each, dict) else ():
            if not isinstance(part, dict):
                continue
            if isinstance(part.get("state"), dict) and "common_step" in part["state"]:
                yield part["state"]["common_step"]
            groups = part.get("param_groups")
            if isinstance(groups, list):
                yield from (group["step"] for group in groups if isinstance(group, dict) and "step" in group)
