"""The paper's experiments on small models, built from runs of the trainer; results are files (docs/windtunnel.md)."""
