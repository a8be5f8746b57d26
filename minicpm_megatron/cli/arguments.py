"""The parser of every command: a mistake in the arguments ends as one in a recipe does."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from minicpm_megatron.errors import UserError


class Parser(argparse.ArgumentParser):
    """argparse's, whose description keeps its lines and whose mistakes are UserErrors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **settings})

    def error(self, message: str) -> NoReturn:
        """Raise UserError: one line, where argparse prints the usage before it."""
        raise UserError(message, where=self.prog, fix="--help says more")
