"""The command `petl squeeze`: a budget of bytes, divided over the layers of an adapter."""

from petl.adapters.search.features import FEATURES
from petl.adapters.search.records import SearchSettings
from petl.adapters.search.squeeze import squeeze as search
from petl.cli.table import SqueezeOptions
from petl.experiments.reports.squeezed import print_squeezed
from petl.system.processes import is_first


def squeeze(options: SqueezeOptions) -> None:
    """Search, write the adapter, and print how it compares with even levels."""
    saved = options.find()
    own = saved.folder.weights.stat().st_size
    size = options.bytes or int((options.share or 0) * own)
    folder = saved.run or saved.adapter.absolute()  # "." has no name
    out = options.out or folder.with_name(f"{folder.name}-{options.what}-{size}")
    settings = SearchSettings(
        options.what,
        size,
        options.metric,
        options.rows,
        options.offspring,
        options.seed,
    )
    made = FEATURES[options.what]
    found = search(saved, made, settings, out, generations=options.generations)
    if is_first():
        print_squeezed(found, own, out)
