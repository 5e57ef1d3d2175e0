"""Export of adapters: merged into the base model, or converted to a plain LoRA."""
