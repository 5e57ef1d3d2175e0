"""The ranks of blocks and their importance on the page of a run."""

from pathlib import Path
from typing import NamedTuple

from petl.experiments.reports.page import column_chart
from petl.training.ranks.file import rank_charts, read_ranks

SECTION = """\
{% if ranks %}
<h2>Ranks by importance</h2>
<p>{{ ranks.text }}</p>
{{ blocks.charts(ranks.charts) }}
{% endif %}
"""


class RanksSection(NamedTuple):
    """A sentence on the measurement, and charts as SVG."""

    text: str
    charts: list[str]


def section_of(run: Path) -> RanksSection:
    """Return the section of a run that has ranks.json."""
    ranks = read_ranks(run)
    data = ranks["calibration"]
    source = "the training data" if data["data"] is None else "other data (ranks.data)"
    text = (
        "Before training, the importance of each block was measured by how much it turns its "
        f"input ({ranks['metric']}), on up to {data['num_samples']:,} samples of at most "
        f"{data['seq_len']:,} tokens of {source}. Blocks of more importance have more rank."
    )
    return RanksSection(text, [column_chart(chart) for chart in rank_charts(ranks)])
