"""Every type of model in transformers' auto maps, built small, with every method."""
