"""The table that a run ends with."""

from typing import Any

from rich.console import Console

from petl.models.sources import RandomInit
from petl.reports.formatting import duration, print_table, size
from petl.runs.run_config import names_of
from petl.runs.run_folder import ADAPTER, Run

ROWS = {
    "before": "before training",
    "linear_probe": "linear probe (head only, frozen backbone)",
    "after": "adapted",
}
COUNTS = ("rows", "tokens", "words")  # beside the scores of an evaluation, and no scores
SHARES = ("accuracy", "f1", "precision", "recall", "exact_match", "density", "sparsity")
SHARES += ("rouge1", "rouge2", "rougeL")


def show(run: Run) -> None:
    """Print the scores of a finished run and where its adapter is, from the main process."""
    if not run.accelerator.is_main_process:
        return
    console, scores = Console(highlight=False), run.scores
    measured = {label: scores[key] for key, label in ROWS.items() if scores.get(key)}
    title = " · ".join(names_of(run.config.resolved))
    if scores["after"]:
        columns = [name for name in scores["after"] if name not in COUNTS]
        rows = [
            [label, *(shown(name, values[name]) if name in values else "" for name in columns)]
            for label, values in measured.items()
        ]
        print_table(["test scores", *(f">{name}" for name in columns)], rows, title)
    else:
        console.print(f"{title}: the test rows were left alone")
    if scores["validation"] is not None:
        best = shown(scores["metric"], scores["validation"])
        console.print(f"best {scores['metric']} on the held-out train rows: {best}")
    if isinstance(run.config.model, RandomInit):
        console.print("the base model's weights are random: nothing was learned before")
    cost = (
        f"{scores['trainable_parameters']:,} trainable parameters, adapter file "
        f"{size(scores['adapter_bytes'])}, trained in {duration(scores['seconds'])}"
    )
    if scores["unit"] == "tokens":  # images and clips are never padded
        cost += f"; {100 * scores['padding']:.1f} % of the computed positions were padding"
    console.print(cost, soft_wrap=not console.is_terminal)
    console.print(f"saved in {run.path / ADAPTER}", soft_wrap=True)
    console.print(
        f'load it: import petl; model = petl.load(base, "{run.path / ADAPTER}")', soft_wrap=True
    )
    if run.tracker and run.tracker.closing():
        console.print(run.tracker.closing(), soft_wrap=True)


def is_share(metric: str) -> bool:
    """Whether a score is shown in per cent."""
    return metric.endswith(SHARES)


def shown(name: str, value: Any) -> str:
    """A score in words, with its unit; a count as it is."""
    if name in COUNTS:
        return f"{value:,.0f}"
    return f"{100 * value:.1f} %" if is_share(name) else f"{value:.3f}"
