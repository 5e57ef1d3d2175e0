"""Inspection of a base model: targets, transformer blocks, quantization."""
