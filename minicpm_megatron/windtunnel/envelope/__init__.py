"""The loss of one size under continued training, and a larger one beside it (section 4.3)."""
