"""The command line of minicpm windtunnel: one module a subcommand."""
