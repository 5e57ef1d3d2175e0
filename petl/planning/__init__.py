"""What a run would need, before it starts: sizes, memory, batch sizes, data."""
