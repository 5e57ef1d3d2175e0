"""The catalog of methods, losses and recipes: their fields, and what they support."""
