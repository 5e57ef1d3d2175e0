"""The file stages.json of a run with data.order=by_class: accuracy by class after each stage."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from petl.core.model.heat_map import HeatMap, draw
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json
from petl.system.settings.schema import LARGEST

STAGES = "stages.json"
PICTURE = "class_stream.png"


class Stage(TypedDict):
    """The scores after a stage.

    `step` is its last step, `trained` the class of its rows. `accuracy` is that of all test rows
    together, `by_class` that of the rows of each class, null for a class without test rows.
    """

    step: int
    trained: str
    accuracy: float
    by_class: dict[str, float | None]


def read_stages(run: Path, up_to: int = LARGEST) -> list[Stage]:
    """Read stages.json of a run's folder, up to a step; empty without the file.

    Raises:
        InputError: it cannot be read, or has numbers or classes that no run writes.
    """
    file = run / STAGES
    if not file.exists():
        return []
    stages: list[Stage] = read_json(file, list[Stage])
    for i, stage in enumerate(stages):
        known = [v for v in (stage["accuracy"], *stage["by_class"].values()) if v is not None]
        wrong = [v for v in known if not 0 <= v <= 1]
        ordered = stage["step"] > (stages[i - 1]["step"] if i else 0)
        same = stage["by_class"].keys() == stages[0]["by_class"].keys()
        if wrong or not ordered or not same or len(known) < 2:
            raise InputError(
                f"{file} cannot be used: [{i}] is no stage of a run, with rising steps, the same "
                "classes as the others, and accuracies from 0 to 1"
            )
    return [stage for stage in stages if stage["step"] <= up_to]


def write_stages(run: Path, stages: Sequence[Stage]) -> None:
    """Write stages.json into a run's folder."""
    write_atomic(run / STAGES, as_json(list(stages), in_order=True))


def stream_scores(stages: Sequence[Stage]) -> dict[str, float]:
    """Return average accuracy and forgetting after the last stage, and the number of stages.

    Average accuracy is the mean over classes of their last accuracy; forgetting is the mean over
    classes of their best accuracy after any stage minus the last one (Chaudhry et al. 2018,
    arXiv:1801.10112, with the last stage among those for the best, so that it is at least 0).
    """
    last = {name: value for name, value in stages[-1]["by_class"].items() if value is not None}
    best = {name: max(stage["by_class"][name] or 0.0 for stage in stages) for name in last}
    lost = [best[name] - value for name, value in last.items()]
    return {
        "average_accuracy": sum(last.values()) / len(last),
        "forgetting": sum(lost) / len(lost),
        "stages": len(stages),
    }


def accuracy_map(stages: Sequence[Stage]) -> HeatMap:
    """Return the accuracy of each class after each stage, in %."""
    names = list(stages[0]["by_class"])

    def percent(value: float | None) -> float | None:
        return None if value is None else 100 * value

    return HeatMap(
        Path(PICTURE).stem,
        "Accuracy of each class after each stage",
        "% of the test rows of the class",
        names,
        [stage["trained"] for stage in stages],
        [[percent(stage["by_class"][name]) for stage in stages] for name in names],
        "A column is a stage, in which the rows of one class were trained on. A row that fades to "
        "the right is a class that is forgotten.",
        "class",
        "stages, by the class that was trained",
    )


def draw_stages(run: Path) -> None:
    """Draw stages.json of a run's folder, if there is one, as class_stream.png."""
    stages = read_stages(run)
    if stages:
        draw(numbered(accuracy_map(stages)), run / PICTURE)


def numbered(shown: HeatMap) -> HeatMap:
    """Return the map with numbers from 1 as columns, for which a picture has room."""
    columns = [str(i) for i in range(1, len(shown.columns) + 1)]
    return replace(shown, columns=columns, column_label="stage, from 1")
