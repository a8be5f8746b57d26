"""Pretrain MiniCPM with Megatron-LM's own trainer; see pretrain_minicpm.sh and docs/megatron_lm.md."""

from minicpm_megatron.cli.entry import run
from minicpm_megatron.megatron_lm.pretrain import main

if __name__ == "__main__":
    run(main)
