"""What is asked of a base model: targets, transformer blocks, quantization."""
