"""The scaling law (section 4.5): runs for it, and the fit of losses from anywhere."""
