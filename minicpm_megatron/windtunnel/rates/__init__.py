"""The best learning rate over sizes (section 3.3)."""
