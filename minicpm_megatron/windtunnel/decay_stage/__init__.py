"""Gradients and updates before and in the decay (section 4.4)."""
