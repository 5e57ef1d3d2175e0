"""The stages of a class-incremental stream on the page of a run."""

from pathlib import Path
from typing import NamedTuple

from petl.core.model.heat_map import HeatMap
from petl.training.runs.class_stream import accuracy_map, read_stages, stream_scores

SECTION = """\
{% if stream %}
<h2>Classes one after the other</h2>
<p>{{ stream.text }}</p>
<div class="heats">{{ blocks.heat(stream.heat) }}</div>
{% endif %}
"""


class StreamSection(NamedTuple):
    """Sentences on the outcome, and accuracy by class and stage."""

    text: str
    heat: HeatMap


def section_of(run: Path) -> StreamSection | None:
    """Return the section of a run that has stages.json; None before its first stage has ended."""
    stages = read_stages(run)
    if not stages:
        return None
    found = stream_scores(stages)
    text = (
        f"The training rows came class by class, in {len(stages)} stages so far; after each, all "
        f"classes were scored. Average accuracy, the mean over classes after the last stage: "
        f"{100 * found['average_accuracy']:.1f} %. Forgetting, the mean over classes of the best "
        f"accuracy after any stage minus the last one: {100 * found['forgetting']:.1f} points."
    )
    return StreamSection(text, accuracy_map(stages))
