"""Names of the scores of an evaluation that have a meaning of their own."""

LOSSES = ("loss", "mse")
# next to the scores: what they average over
COUNTS = ("rows", "tokens", "words", "answers")
# a proportion of independent examples (`rows`)
PROPORTIONS = ("accuracy", "exact_match")
PERCENTAGES = ("accuracy", "f1", "precision", "recall", "exact_match", "density", "sparsity")
PERCENTAGES += ("rouge1", "rouge2", "rougeL")  # ends of the names of scores from 0 to 1


def is_percentage(name: str) -> bool:
    """Return True if a score of this name is shown as a percentage."""
    return name.endswith(PERCENTAGES)


def named(task: str, scores: dict[str, float], metric: str) -> dict[str, float]:
    """Return metric and loss of one of several tasks, with its name before theirs."""
    return {f"{task}_{name}": scores[name] for name in (metric, *LOSSES) if name in scores}
