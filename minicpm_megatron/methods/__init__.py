"""The paper's ideas as pure functions of their arguments: torch at most, no globals, no process groups, no clock."""
