"""Parameter-efficient fine-tuning of any Hugging Face model."""
