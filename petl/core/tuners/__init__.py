"""Base classes of petl's PEFT tuners."""
