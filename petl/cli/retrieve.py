"""The commands `petl retrieve` and `petl mine`: the texts that are near to queries."""

from petl.cli.table import MineOptions, RetrieveOptions

SHOWN = 240  # characters of a text; its id tells where the rest is


def retrieve(options: RetrieveOptions) -> None:
    """Print the nearest texts of each query, with their similarities."""
    from petl.experiments.reports.formatting import echo, print_table
    from petl.generation.prediction.vectors import load_embedder, nearest, read_corpus

    texts = read_corpus(options.corpus, options.column)
    predictor = load_embedder(
        options.run, trust_remote_code=options.trust_remote_code, other_base=options.other_base
    )
    found = nearest(predictor, texts, options.query, options.k, options.vectors)
    for query, hits in zip(options.query, found, strict=True):
        echo(query)
        rows = [[f"{each.similarity:.3f}", each.id, on_a_line(each.text)] for each in hits]
        print_table([">similarity", "id", "text"], rows)


def on_a_line(text: str) -> str:
    """Return the beginning of a text, with single spaces."""
    words = " ".join(text.split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"


def mine(options: MineOptions) -> None:
    """Write triples with the negatives that an embedder finds hard."""
    from petl.experiments.reports.formatting import echo
    from petl.generation.prediction.mining import NegativeChoice, mine, read_pairs
    from petl.generation.prediction.tables import check_format, keep_inputs
    from petl.generation.prediction.vectors import load_embedder, read_corpus

    # all files before the model: a wrong one is told in seconds
    check_format(options.out)
    keep_inputs(options.out, filter(None, [options.corpus, options.queries, options.vectors]))

    choice = NegativeChoice(options.k, options.margin, options.skip)
    texts = [text for _, text in read_corpus(options.corpus, options.column)]
    pairs = read_pairs(options.queries, options.query, options.positive)
    predictor = load_embedder(
        options.run,
        batch_size=options.batch_size,
        trust_remote_code=options.trust_remote_code,
        other_base=options.other_base,
    )
    rows, negatives = mine(predictor, texts, pairs, options.out, choice, options.vectors)
    echo(f"{options.out}: {rows:,} rows with {negatives / rows:.1f} negatives each")
