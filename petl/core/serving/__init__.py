"""Batches whose rows use different adapters."""
