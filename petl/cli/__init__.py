"""The `petl` command, and the entry point of train.py."""
