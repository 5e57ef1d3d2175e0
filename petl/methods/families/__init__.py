"""Tuners and layers from which several methods derive."""
