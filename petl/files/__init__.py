"""Atomic writes, optional packages, and files from packages and the Hugging Face hub."""
