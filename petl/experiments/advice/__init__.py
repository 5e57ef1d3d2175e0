"""Advice: which method, rank and learning rate, within the cost of a few runs (`petl advise`)."""
