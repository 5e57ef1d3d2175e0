"""Experts of a mixture, whose weights are stacked: one 3-D parameter for all experts of a layer."""
