"""Base models and their processors: from a package, a folder, the hub, or random weights."""
