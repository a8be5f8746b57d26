"""WSD against Cosine, decays of every share and shape (sections 4.1 to 4.3)."""
