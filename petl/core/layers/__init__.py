"""The layer that hosts adapters, and what happens in its forward pass."""
