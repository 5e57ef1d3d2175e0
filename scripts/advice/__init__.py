"""The evidence of `petl advise`: tasks, the grid of runs, and the table of their scores."""
