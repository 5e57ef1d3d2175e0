"""Callbacks for the trainers of other libraries: transformers, TRL."""
