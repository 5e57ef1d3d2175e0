"""Estimates before a run: parameters, memory, batch sizes, and a preview of the data."""
