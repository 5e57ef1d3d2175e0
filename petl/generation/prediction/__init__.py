"""Predict rows of files with a saved adapter, and evaluate it on them."""
