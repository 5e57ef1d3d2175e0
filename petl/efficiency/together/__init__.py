"""Several adapters of one method on one base, in one pass."""
