"""Objectives: one file each, called as recipes name it, with "_" for "-"."""
