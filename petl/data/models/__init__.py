"""Base models and their processors: from a package, a folder, the Hub, or random weights."""
