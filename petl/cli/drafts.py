"""The command `petl draft`: train a drafter for a saved model."""

from petl.cli.table import DraftOptions
from petl.experiments.reports.formatting import echo, print_table
from petl.training.compose import compose


def draft(options: DraftOptions) -> None:
    """Train a drafter, and print what it gives."""
    cfg = compose(options.overrides, "draft")
    from petl.generation.inference.draft_training import train_drafter

    trained = train_drafter(
        options.run,
        cfg,
        trust_remote_code=options.trust_remote_code,
        other_base=options.other_base,
    )
    if trained is None:  # the first process has it
        return
    rows = [
        (i, *(f"{value:.3f}" for value in row[:3]), f"{sum(row):.3f}")
        for i, row in enumerate(trained.frequencies, start=1)
    ]
    print_table(("depth" if trained.loss is None else "head", ">rank 1", ">2", ">3", ">any"), rows)
    loss = "" if trained.loss is None else f", loss {trained.loss:.3f}"
    echo(f"\n{trained.answers} answers of {trained.tokens:,} tokens{loss}")
    if trained.alone.passes:
        echo(
            f"tokens per pass on other prompts: {trained.alone.tokens_per_pass:.2f}, behind lookup "
            f"{trained.behind_lookup.tokens_per_pass:.2f}"
        )
    echo(f"written: {trained.folder}; used by petl generate and petl chat")
