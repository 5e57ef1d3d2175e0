"""The command `petl strength`: an adapter turned up or down."""

from petl.adapters.deltas.strength import note_trade, trade_of, write_strength
from petl.cli.table import StrengthOptions
from petl.errors import InputError
from petl.experiments.reports.formatting import echo, print_table, score
from petl.experiments.reports.run_report import write_page
from petl.training.retain.texts import BUNDLED, texts_for


def strength(options: StrengthOptions) -> None:
    """Print the trade, and write the adapter of the strength that is chosen."""
    if (options.choose is None) != (options.out is None):
        given = "--choose" if options.out is None else "--out"
        raise InputError(f"{given} is given alone: --choose S and --out FOLDER go together")
    saved = options.find()
    kind, value = options.choose or ("", 0.0)
    if kind == "strength" and options.out is not None:  # there is nothing to find out
        write_strength(saved, value, options.out)
        echo(f"written with strength {value:g} to {options.out}")
        return
    texts = texts_for(options.retain or [BUNDLED], saved.task, saved.settings)
    trade = trade_of(
        saved, texts, options.strengths, files=options.data, batch_size=options.batch_size
    )
    # before the table, so that it is kept if the terminal is closed
    note_trade(saved, trade)
    if saved.run is not None:
        write_page(saved.run)
    rows = [
        [f"{each:g}", score(trade.metric, trade.scores[each]), f"{trade.lost[each]:+.4f}"]
        for each in trade.scores
    ]
    title = f"{trade.rows:,} {'examples of files' if options.data else 'validation examples'}"
    print_table(["strength", f">{trade.metric}", ">lost on other texts"], rows, title)
    if options.out is not None:
        chosen = trade.within(value)
        write_strength(saved, chosen, options.out)
        echo(f"strength {chosen:g}: the best that loses at most {value:g}")
        echo(f"written to {options.out}")
