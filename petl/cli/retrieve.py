"""The command `petl retrieve`: the texts of a file that are nearest to queries."""

from petl.cli.table import RetrieveOptions


def retrieve(options: RetrieveOptions) -> None:
    """Print the nearest texts of each query, with their similarities."""
    from petl.experiments.reports.formatting import echo, print_table
    from petl.generation.prediction.vectors import nearest, read_corpus

    texts = read_corpus(options.corpus)
    found = nearest(options.find(), texts, options.query, options.k, options.vectors)
    for query, hits in zip(options.query, found, strict=True):
        echo(query)
        rows = [[f"{each.similarity:.3f}", each.id, each.text] for each in hits]
        print_table([">similarity", "id", "text"], rows)
