"""Bayesian search over the four constants of muP (section 3.1, appendix A.1)."""
