"""A run on one page, report.html, which is made of what stands in the run's folder alone."""

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from petl.errors import InputError
from petl.files.disk import replace
from petl.reports.formatting import duration, size
from petl.reports.html import embedded, page
from petl.reports.summary import COUNTS, ROWS, shown
from petl.reports.svg import Curve, bars, curves
from petl.runs.resume import CONFIG, SCORES, read_scores, read_stored
from petl.runs.run_config import names_of
from petl.runs.run_folder import ADAPTER, METRICS, Run, step_of

REPORT = "report.html"
NATS = {"classification": "loss, nats a row", "causal_lm": "loss, nats a token"}
PLAIN = {
    "step",
    "epoch",
    "loss",
    "aux_loss",
    "grad_norm",
    "lr",
    "tokens",
    "padding",
    "seconds",
    "validation",
}
NO_SCORES = (*COUNTS, "lr")  # beside the scores of a table


def write_report(run: Run) -> None:
    """Write the report of a finished run, in its main process."""
    if run.accelerator.is_main_process:
        write_page(run.path)


def write_page(folder: Path) -> Path:
    """Write report.html into the folder of a run, finished or not; the file.

    Raises:
        InputError: it is no folder of a run.
    """
    record = RunRecord(folder)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is no folder of a run: it has no {CONFIG}")
    replace(
        folder / REPORT,
        page(
            " · ".join(names_of(record.config)),
            BODY,
            summary=summary(record),
            table=score_table(record),
            facts=facts(record),
            charts=charts(record),
            clock=clock(record),
            time=bars(record.times, unit="s") if record.times else "",
            pictures=[(heading(path), embedded(path)) for path in record.pictures],
            loading=record.loading,
            config=OmegaConf.to_yaml(OmegaConf.create(record.config)),
            environment=environment(record),
        ),
    )
    return folder / REPORT


@dataclass(frozen=True)
class RunRecord:
    """What the folder of a run holds; what is not there yet is empty."""

    folder: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_stored(self.folder / CONFIG)

    @cached_property
    def scores(self) -> dict[str, Any]:
        return read_scores(self.folder) if (self.folder / SCORES).is_file() else {}

    @cached_property
    def environment(self) -> dict[str, Any]:
        return self._json("environment.json")

    def _json(self, name: str) -> dict[str, Any]:
        file = self.folder / name
        return json.loads(file.read_text()) if file.is_file() else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl, one that a killed process cut short left out."""
        file = self.folder / METRICS
        lines = file.read_text().splitlines() if file.is_file() else []
        return [json.loads(line) for line in lines if step_of(line) < float("inf")]

    def series(self, key: str, inner: str | None = None) -> list[tuple[float, float]]:
        """A figure of the log against the step."""
        found = [(line["step"], line[key]) for line in self.metrics if key in line]
        return [(step, value[inner] if inner else value) for step, value in found]

    @property
    def times(self) -> dict[str, float]:
        """Seconds by what they were spent on, the most first."""
        spent = {name: s for name, s in self.scores.get("time_split", {}).items() if s >= 1e-3}
        return dict(sorted(spent.items(), key=lambda item: -item[1]))

    @property
    def pictures(self) -> list[Path]:
        return sorted(self.folder.glob("*.png"))

    @property
    def loading(self) -> str:
        """The lines that load the adapter."""
        readme = self.folder / ADAPTER / "README.md"
        text = readme.read_text() if readme.is_file() else ""
        return "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


# Words and tables


def summary(record: RunRecord) -> str:
    """The outcome in a sentence."""
    scores = record.scores
    if "metric" not in scores:
        return f"The run is not finished; its log reaches step {last_step(record)}."
    metric, after = scores["metric"], scores["after"]
    if after is None:
        best = shown(metric, scores["validation"])
        return (
            f"{metric.capitalize()} on held-out train rows: {best}. The test rows were left alone."
        )
    count = f"{after['rows']:,.0f} test rows" if "rows" in after else "the test rows"
    told = f"{metric.capitalize()} on {count}: {shown(metric, after[metric])}"
    others = [
        f"{shown(metric, scores[key][metric])} {words}"
        for key, words in (("before", "before training"), ("linear_probe", "linear probe"))
        if scores.get(key)
    ]
    return f"{told} ({', '.join(others)})." if others else f"{told}."


def last_step(record: RunRecord) -> int:
    return record.metrics[-1]["step"] if record.metrics else 0


def score_table(record: RunRecord) -> list[list[str]]:
    """Rows of cells, the names of the columns first; empty without scores."""
    found = {label: record.scores[key] for key, label in ROWS.items() if record.scores.get(key)}
    every = {record.scores["metric"]: None} if "metric" in record.scores else {}
    every |= dict.fromkeys(name for values in found.values() for name in values)
    names = [name for name in every if name not in NO_SCORES]
    rows = [
        [label, *(shown(name, values[name]) if name in values else "" for name in names)]
        for label, values in found.items()
    ]
    return [["test scores", *names], *rows] if rows else []


def facts(record: RunRecord) -> dict[str, str]:
    """Sizes, length and cost of a finished run, by what they are."""
    scores = record.scores
    if "steps" not in scores:
        return {}
    told = {
        "trained parameters": f"{scores['trainable_parameters']:,}, those of a head included",
        "parameters of the adapter": f"{scores['adapter_parameters']:,}",
        "adapter file": f"{size(scores['adapter_bytes'])} ({scores['adapter_bytes']:,} bytes)",
        "length": f"{scores['steps']:,} steps, {scores['tokens']:,} {scores['unit']}",
        "time in the training loop": f"{duration(scores['seconds'])}, "
        f"{duration(scores['cpu_seconds'])} of processor time",
        "most memory of the process": size(scores["peak_rss_bytes"]),
    }
    if scores["unit"] == "tokens":  # images and clips are never padded
        told["padding"] = f"{100 * scores['padding']:.1f} % of the computed positions"
    if "peak_device_bytes" in scores:
        told["most memory of the device"] = size(scores["peak_device_bytes"])
    if scores["best_step"] is not None:
        best = shown(scores["metric"], scores["validation"])
        told["adapter kept"] = f"that of step {scores['best_step']:,}, {best} on held-out rows"
    head = f", of the head {scores['head_lr']:.3g}" if scores.get("head_lr") else ""
    told["peak learning rate"] = f"{scores['lr']:.3g}{head}"
    if scores.get("find_lr"):
        told["peak learning rate"] += f"; {scores['find_lr']['rule']}"
    return told


def environment(record: RunRecord) -> dict[str, str]:
    """Where and with what the run was made, by what it is called."""
    found = record.environment
    if not found:
        return {}
    device = "" if found["device"] == "cpu" else f"{found['device']}; "
    return {
        "command": shlex.join(shlex.split(found["command"])),
        "started": found["started"],
        "machine": f"{device}{found['processor']}; cores: {found['cores']}, threads of a process: "
        f"{found['threads']}, processes: {found['processes']}",
        "platform": f"{found['platform']}, Python {found['python']}",
        "petl at": str(found["git"]),
        "packages": ", ".join(
            f"{name} {number}" for name, number in found["packages"].items() if number
        ),
    }


def clock(record: RunRecord) -> str:
    """How the time was measured."""
    found = record.environment
    if found.get("device", "cpu") == "cpu":
        return "By the clock of the main process."
    return (
        "On the device's own clock, between events in the stream of the main process; data is the "
        "time that the device stood idle for them."
    )


# Pictures


def heading(picture: Path) -> str:
    """What a picture is called: `ranks.png` shows the ranks."""
    known = {"lr_range": "Range test for the learning rate"}
    return known.get(picture.stem, picture.stem.replace("_", " ").capitalize())


def charts(record: RunRecord) -> list[str]:
    """What the log tells, against the step, as SVG."""
    nats = NATS.get(record.scores.get("task", ""), "loss")
    held_out = record.series("validation", "loss") if has_validation(record, "loss") else []
    found = [([Curve("train", record.series("loss")), Curve("held out", held_out)], nats)]
    for name in validation_scores(record):
        factor = 100 if shown(name, 0.0).endswith("%") else 1
        points = [(step, factor * value) for step, value in record.series("validation", name)]
        unit = ", %" if factor == 100 else ""
        found.append(([Curve(name, points)], f"held-out {name}{unit}"))
    for key, label in (
        ("aux_loss", "auxiliary loss, weighted"),
        ("grad_norm", "norm of the gradient, unclipped"),
        ("lr", "learning rate of the adapter"),
    ):
        found.append(([Curve(label, record.series(key))], label))
    own = dict.fromkeys(key for line in record.metrics for key in line if key not in PLAIN)
    found += [([Curve(key, record.series(key))], key.replace("_", " ")) for key in own]
    drawn = []
    for lines, label in found:
        full = [line for line in lines if line.points]
        if full:
            drawn.append(curves(full, x="optimizer step", y=label))
    return drawn


def has_validation(record: RunRecord, name: str) -> bool:
    return any(name in line.get("validation", {}) for line in record.metrics)


def validation_scores(record: RunRecord) -> Sequence[str]:
    """The scores on held-out rows, the loss left out."""
    lines: list[Mapping[str, Any]] = [line.get("validation", {}) for line in record.metrics]
    every = dict.fromkeys(name for line in lines for name in line)
    return [name for name in every if name not in (*NO_SCORES, "loss")]


BODY = """\
<p>{{ summary }}</p>
{% if table %}
<div class="wide"><table>
<tr>{% for cell in table[0] %}<th>{{ cell }}</th>{% endfor %}</tr>
{% for row in table[1:] %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
{% endif %}
{% if facts %}
<dl>{% for name, text in facts.items() %}<dt>{{ name }}</dt><dd>{{ text }}</dd>{% endfor %}</dl>
{% endif %}
{% if charts %}
<h2>Training</h2>
<div class="charts">{% for chart in charts %}<figure>{{ chart | safe }}</figure>{% endfor %}</div>
{% endif %}
{% if time %}
<h2>Where the time went</h2>
<figure>{{ time | safe }}</figure>
<p>{{ clock }}</p>
{% endif %}
{% for name, picture in pictures %}
<h2>{{ name }}</h2>
<figure><img alt="{{ name }}" src="{{ picture }}"></figure>
{% endfor %}
{% if loading %}
<h2>Load the adapter</h2>
<pre>{{ loading }}</pre>
{% endif %}
<h2>Configuration</h2>
<pre>{{ config }}</pre>
{% if environment %}
<h2>Environment</h2>
<dl>{% for name, text in environment.items() %}
<dt>{{ name }}</dt><dd>{{ text }}</dd>
{% endfor %}</dl>
{% endif %}
"""
