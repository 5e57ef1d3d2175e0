"""How much a model has forgotten: its losses on other texts with and without what was trained."""
