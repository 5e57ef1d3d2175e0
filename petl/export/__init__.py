"""Adapters leave petl: merged into the base model, or written as a plain LoRA."""
