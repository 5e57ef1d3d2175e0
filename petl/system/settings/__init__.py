"""A run's configuration: composed by Hydra, read into typed settings."""
