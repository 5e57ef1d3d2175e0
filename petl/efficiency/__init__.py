"""Rewrites: the same adapted model in less time or memory; one file or folder each."""

# Must come first: at the end of this import petl's methods register, and they import rewrites.
import peft  # noqa: F401
