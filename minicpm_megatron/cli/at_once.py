"""For scripts alone, as their first import: from here on Ctrl-C ends the process at once (`interrupts`)."""

from __future__ import annotations

from minicpm_megatron.cli.interrupts import leave_at_once

leave_at_once()
