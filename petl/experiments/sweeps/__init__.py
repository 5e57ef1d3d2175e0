"""Several runs: studies of methods, and Hydra's multirun."""
