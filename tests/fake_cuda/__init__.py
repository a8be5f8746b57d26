"""A pretended CUDA machine: fake tensors on device cuda, torch's fake process group, a runtime that only answers."""
