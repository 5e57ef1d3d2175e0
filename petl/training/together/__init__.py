"""Adapters of one method that train at once over one base, in one forward and backward pass."""
