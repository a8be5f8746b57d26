"""One adapter for each kind of optimizer that DeepSpeed builds, by ZeRO stage, precision and offloading."""
