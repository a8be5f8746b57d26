"""The coordinate check (Table 7)."""
