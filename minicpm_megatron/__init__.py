"""MiniCPM (arXiv 2404.06395) on NVIDIA Megatron-Core, driven by DeepSpeed."""

__version__ = "0.1.0"
