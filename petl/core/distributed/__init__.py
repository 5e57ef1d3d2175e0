"""Collectives and sharded tensors, which do nothing on one process."""
