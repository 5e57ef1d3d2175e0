"""Positions of the last block that nothing reads."""
