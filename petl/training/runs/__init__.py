"""The folder of a run: settings, checkpoints, resume, lock, environment."""
