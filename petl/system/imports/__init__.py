"""Registration with PEFT when it is imported, optional packages, and noisy import messages."""
