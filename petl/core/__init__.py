"""What every method shares: registry, targets, layers, tuner, lifecycle. It knows no method."""
