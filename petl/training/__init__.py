"""The training loop, its data, optimizer and evaluation, and the linear probe."""
