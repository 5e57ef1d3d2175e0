"""Atomic writes, the cache folder, and files from packages and the Hugging Face Hub."""
