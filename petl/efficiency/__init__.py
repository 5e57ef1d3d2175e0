"""Rewrites: the same adapted model computed with less time or memory; one file or folder each."""
