"""What every method shares: registry, targets, layers, tuner, lifecycle. It knows no method."""

# First of all: at the end of this import petl's methods register, and they import what is here.
import peft  # noqa: F401
