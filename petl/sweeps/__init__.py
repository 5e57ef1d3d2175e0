"""Several runs: studies, and Hydra's multirun."""
