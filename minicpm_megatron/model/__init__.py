"""What is trained: MiniCPM out of Megatron-Core's own modules, registered through its specs."""
