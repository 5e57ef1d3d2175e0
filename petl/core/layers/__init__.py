"""Adapter layers and their forward pass: context, fused LoRA, recomputation."""
