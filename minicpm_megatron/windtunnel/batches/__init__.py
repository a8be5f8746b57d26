"""The batch size that needs the fewest tokens for a loss (section 3.2)."""
