"""Choices for what new tensors get of Adam's moments, the default first."""

from __future__ import annotations

EXPERT_MOMENTS = ("clone", "drop")
"""Of upcycled experts: the dense MLP's, or zeros; see `methods.upcycling.upcycle_moment`."""
HEAD_MOMENTS = ("copy", "zero")
"""Of an untied head: the embedding's, or zeros; see `convert.untying.untie_rewrite`."""
