"""`python -m minicpm_megatron`, which is the `minicpm` command."""

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from minicpm_megatron.cli.entry import run
from minicpm_megatron.cli.main import main


def script() -> None:
    """Run the command; the entry point of `minicpm`."""
    run(main)


if __name__ == "__main__":
    script()
