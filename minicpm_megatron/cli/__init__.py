"""The `minicpm` command: one file a command, with its arguments and exit codes. The work is in the rooms below."""
