"""Where a run takes place: process groups, devices, and the bridge between Megatron-Core's groups and DeepSpeed."""
