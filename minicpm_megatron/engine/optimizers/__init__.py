"""Optimizers that a recipe may name: one file each, which `registry.OPTIMIZERS` finds by its name."""
