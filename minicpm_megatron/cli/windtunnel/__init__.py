"""The command line of tools/windtunnel.py: one module a subcommand."""
