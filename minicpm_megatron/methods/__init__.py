"""The paper's ideas as pure functions: torch, numpy and scipy at most, no globals, no process groups, no clock."""
