"""What `petl shrink` prints, and README and page of the folder that it writes."""

from pathlib import Path

from petl.core.model.layer_widths import FILE as WIDTHS
from petl.core.types import Record
from petl.data.tasks.scores import shown
from petl.errors import markdown
from petl.experiments.reports.formatting import (
    echo,
    interval,
    interval_text,
    print_table,
    score,
    size,
)
from petl.experiments.reports.page import chart, render_page
from petl.training.features.bars import Bar, Bars

PAGE = "shrink.html"


def rows_of(record: Record) -> list[tuple[str, str, str]]:
    """Return name, score and interval of each model that was scored."""
    metric = record["metric"]
    rows = []
    for name, values in record["scores"].items():
        limits = interval(metric, values[metric], values)
        between = "" if limits is None else interval_text(metric, limits)
        rows.append((name, score(metric, values[metric]), between))
    return rows


def pruned(record: Record) -> dict[str, tuple[int, int]]:
    """Return the numbers, before and after, of what leaves the blocks."""
    blocks = record["blocks"]
    found = {"MLP channels": ("width", "channels")}
    if record["settings"]["heads"]:
        found["heads of attention"] = "query_heads", "heads"
    return {
        name: (sum(block[before] for block in blocks), sum(len(block[kept]) for block in blocks))
        for name, (before, kept) in found.items()
    }


def facts_of(record: Record) -> list[tuple[str, str, str, str]]:
    """Return what is smaller: its name, before, after, and the share that is left."""
    # name, values before and after, and how they are shown
    numbers = {
        **{name: (pair, "{:,}".format) for name, pair in pruned(record).items()},
        "parameters": (record["parameters"], "{:,}".format),
        "bytes": (record["bytes"], size),
        "forward pass": (record["seconds"], lambda s: f"{1000 * s:.1f} ms"),
    }
    return [
        (name, text(a), text(b), f"{100 * b / a:.1f} %") for name, ((a, b), text) in numbers.items()
    ]


def print_shrunk(record: Record, out: Path) -> None:
    """Print what is smaller, and the scores."""
    print_table(("", ">before", ">after", ">left"), facts_of(record))
    echo()
    head = ("model", f">{shown(record['metric'])}", ">95 % interval")
    print_table(head, rows_of(record), "test examples")
    echo(f"{out} is a model; its page: {out / PAGE}")


def charts_of(record: Record) -> list[Bars]:
    """Return charts of what stays of each block, and of the importance of the blocks."""
    blocks = record["blocks"]

    def bars(title: str, y: str, values: list[float], line: tuple[str, float] | None) -> Bars:
        found = []
        for block, value in zip(blocks, values, strict=True):
            # of an encoder-decoder, two colors
            stack, _, name = block["path"].rpartition(".")
            found.append(Bar(stack, name, value, f"{block['path']}\n{y}: {value:.4g}"))
        return Bars(title, "block of the model, from 0", y, found, line)

    settings = record["settings"]
    shares = [len(block["channels"]) / block["width"] for block in blocks]
    importance = [block["importance"] for block in blocks]
    return [
        bars("Channels that stay", "share", shares, ("goal", 1 - settings["sparsity"])),
        bars("Importance by block", settings["metric"], importance, None),
    ]


def page(record: Record, title: str) -> str:
    """Return the page of a shrunk model."""
    return render_page(
        title,
        "shrink.html",
        facts=facts_of(record),
        scores=rows_of(record),
        metric=shown(record["metric"]),
        charts=[chart(each) for each in charts_of(record)],
    )


def card(record: Record, command: str) -> str:
    """Return the text of README.md; `command` is the one that made the model."""
    settings = record["settings"]
    facts = "\n".join(f"| {' | '.join(row)} |" for row in facts_of(record))
    scores = "\n".join(f"| {' | '.join(row)} |" for row in rows_of(record))
    load = BY_BLOCK if settings["widths"] == "by_block" else EVEN
    return CARD.format(
        source=markdown(settings["source"]),
        removed=" and ".join(
            f"{100 * (1 - after / before):.1f} % of the {name}"
            for name, (before, after) in pruned(record).items()
        ),
        recovered=RECOVERED if "recovered" in record["scores"] else "It was not trained again.",
        metric=markdown(shown(record["metric"])),
        facts=facts,
        scores=scores,
        command=command,
        load=load.format(name=record["class"], widths=WIDTHS),
    )


RECOVERED = (
    "Then a LoRA, with more rank in more important blocks, was trained on the smaller model and "
    "merged into it."
)
CARD = """\
# {source}, made smaller

{removed} of {source} were removed by one forward pass over
calibration rows (CFSP, arXiv:2409.13199). {recovered} `shrink.json` has what stays, by block.

|  | before | after | left |
| --- | --: | --: | --: |
{facts}

| model | {metric} on test examples | 95 % interval |
| --- | --: | --: |
{scores}

```bash
{command}
```

{load}"""
EVEN = """\
`{name}.from_pretrained` loads it; no other library is needed.
"""
BY_BLOCK = """\
Blocks have MLPs of unequal widths, which are in {widths}. With petl: `petl.load_shrunk(folder)`.
Without petl:

```python
import json
from pathlib import Path

from safetensors.torch import load_file
from torch.nn import Linear
from transformers import AutoConfig, {name}
from transformers.pytorch_utils import Conv1D

config = AutoConfig.from_pretrained(".")
model = {name}(config)
for path, (width, out) in json.load(open("{widths}"))["layers"].items():
    old = model.get_submodule(path)
    new = Linear(width, out, bias=old.bias is not None)
    model.set_submodule(path, Conv1D(out, width) if isinstance(old, Conv1D) else new)
state = {{}}
for file in Path().glob("model*.safetensors"):  # a large model has several
    state |= load_file(file)
missing, unexpected = model.load_state_dict(state, strict=False)
model.tie_weights()  # missing: tied weights at most
model.to(config.dtype).eval()
```
"""
