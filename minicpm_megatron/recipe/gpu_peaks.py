"""Stated peaks of GPUs by the exact name that CUDA gives them. Imports no torch, so that a plan needs none."""

from __future__ import annotations

# Dense bf16 FLOP/s. NVIDIA's data sheets print twice as much where they count structured sparsity, which training does
# not use; their printed number is in brackets. A name that is not listed (a MIG slice, another board of the same chip)
# has another peak: `training.flops` measures it.
PEAK_FLOPS: dict[str, float] = {
    # A100 data sheet: 312; the PCIe boards have the same. A800: the same chip with a slower NVLink
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A800-SXM4-80GB": 312e12,
    "NVIDIA A800 80GB PCIe": 312e12,
    # A30 data sheet: 165. A10: 125. A40: 149.7
    "NVIDIA A30": 165e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A40": 149.7e12,
    # H100 data sheet: SXM (1,979), NVL (1,671). H100 PCIe product brief: (1,513). H800: the same chips, slower NVLink
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835.5e12,
    "NVIDIA H100 PCIe": 756.5e12,
    "NVIDIA H800": 989e12,
    "NVIDIA H800 PCIe": 756.5e12,
    # H200 data sheet: SXM (1,979), NVL (1,671)
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835.5e12,
    # GH200 data sheet: (1,979), with 96 GB of HBM3 and with 144 GB of HBM3e
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA GH200 144G HBM3e": 989e12,
    # H20 data sheet: 148
    "NVIDIA H20": 148e12,
    # Blackwell architecture data sheet: HGX B200 (4,500 a GPU), GB200 NVL72 (5,000 a GPU)
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    # L40S data sheet: 362 (733). L40: 181. L4: (242)
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
}
