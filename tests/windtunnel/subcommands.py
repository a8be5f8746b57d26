"""Subcommands of tools/windtunnel.py."""

EXPERIMENTS = {"coord-check", "lr", "wsd", "decay-study", "scaling-law", "batch-size", "envelope", "search"}
