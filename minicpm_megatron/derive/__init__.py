"""Runs made of other runs and of published models: upcycled, untied, moved to another folder, begun with weights."""
