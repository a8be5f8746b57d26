"""`minicpm build-retrieval-set` as a script. See --help."""

from minicpm_megatron.cli import at_once  # noqa: F401  # isort: skip

from minicpm_megatron.cli.build_retrieval_set import main
from minicpm_megatron.cli.entry import run

if __name__ == "__main__":
    run(main)
