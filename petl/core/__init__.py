"""Code that all methods share: registry, targets, layers, tuner, lifecycle; imports no method."""

# Must come first: at the end of this import petl's methods register, and they import petl.core.
import peft  # noqa: F401
