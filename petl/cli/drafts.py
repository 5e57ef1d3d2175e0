"""The command `petl draft`: train a drafter for a saved model.

Imports what `petl.cli.main` may import; the function imports its modules when it runs.
"""

import argparse

from petl.cli.arguments import Add, add_run

DRAFT = """\
Train a drafter for the model of a run, and write it to RUN/drafter, where petl generate finds it.
The model answers prompts of its training examples; small heads learn to guess these answers ahead,
or a table of likely next tokens is filled.
Answers stay what they are, and come in fewer passes of the model.

  petl draft runs/mine +drafter=hydra
  petl draft runs/mine +drafter=hydra drafter.heads=4 draft.answers=500 draft.tokens=256
  petl draft runs/mine/adapter +drafter=hydra draft.file=prompts.jsonl
  petl draft runs/mine +drafter=recycling    # fill the table of a drafter that has no weights

SETTINGs are those of configs/draft.yaml and configs/drafter. The folder of an adapter or a merged
model has no training examples: draft.file names prompts. An earlier RUN/drafter is replaced."""


def add_parsers(add: Add) -> argparse.ArgumentParser:
    """Add the parser of the command with `add`, and return it."""
    command = add("draft", "train a drafter: faster answers of a run's model", DRAFT)
    add_run(command, what="folder of a run, of an adapter, or of a merged model")
    command.add_argument(
        "overrides",
        metavar="SETTING",
        nargs="*",
        default=[],
        help="+drafter=NAME, drafter.FIELD=VALUE, draft.SETTING=VALUE",
    )
    return command


def draft(arguments: argparse.Namespace) -> None:
    """Train a drafter, and print what it gives."""
    from petl.experiments.reports.formatting import echo, print_table
    from petl.generation.inference.draft_training import train_drafter
    from petl.training.compose import compose

    cfg = compose(arguments.overrides, "draft")
    trained = train_drafter(
        arguments.run,
        cfg,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
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


COMMANDS = {"draft": draft}
