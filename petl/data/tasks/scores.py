"""Names of the scores of an evaluation that have a meaning of their own."""

LOSSES = ("loss", "mse")
# next to the scores: what they average over
COUNTS = ("rows", "tokens", "words", "answers")
# a proportion of independent examples (`rows`)
PROPORTIONS = ("accuracy", "exact_match")
