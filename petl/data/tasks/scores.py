"""Names of the scores of an evaluation that have a meaning of their own."""

LOSSES = ("loss", "mse")
# next to the scores: what they average over
COUNTS = ("rows", "tokens", "words", "answers", "queries")
NOTES = ("queries_left_out", "queries_with_ties")  # further counts
INTERVAL = "_interval"  # ends the name of half of the 95 % interval of a score
# a proportion of independent examples (`rows`)
PROPORTIONS = ("accuracy", "exact_match")
RANKING = {"ndcg": "nDCG", "mrr": "MRR", "map": "MAP"}
PERCENTAGES = ("accuracy", "f1", "precision", "recall", "exact_match", "density", "sparsity")
PERCENTAGES += ("rouge1", "rouge2", "rougeL")  # ends of the names of scores from 0 to 1


def is_percentage(name: str) -> bool:
    """Return True if a score of this name is shown as a percentage."""
    return name.endswith(PERCENTAGES)


def is_beside(name: str) -> bool:
    """Return True for what stands beside the scores: a count, or the interval of one of them."""
    return name in (*COUNTS, *NOTES) or name.endswith(INTERVAL)


def shown(name: str) -> str:
    """Return the name of a score as tables have it: "nDCG@10" for ndcg_at_10."""
    word, _, cut = name.partition("_at_")
    return f"{RANKING.get(word, word)}@{cut}" if cut else name


def named(task: str, scores: dict[str, float], metric: str) -> dict[str, float]:
    """Return metric and loss of one of several tasks, with its name before theirs."""
    return {f"{task}_{name}": scores[name] for name in (metric, *LOSSES) if name in scores}
