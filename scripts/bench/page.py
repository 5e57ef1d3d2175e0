"""Insert the tables of a result into a markdown page, between marks:

    <!-- bench: step -->
    ...
    <!-- end -->

The word is a section, for all its tables; `summary`, for a table with one line per row over several
sections; or `short`, for the first columns of that. A section may be followed by the beginning of a
shape, such as `job MiniLM on WordNet verbs`, for its table alone. What a result did not measure is
left unchanged, so that several results may fill one page.
"""

import re
from collections.abc import Mapping

from bench.records import Record, Result
from bench.report import (
    ITSELF,
    TITLES,
    circumstances,
    format_value,
    label,
    remarks,
    row_label,
    tables,
)
from petl.errors import InputError
from petl.experiments.reports.formatting import Table

SUMMARY, SHORT = "summary", "short"
FIRST = ("step / lower bound", "/ PEFT's LoRA", "adapter file (kB)")  # ends of column names
MARKS = re.compile(r"(<!-- bench: (\S+)(?: ([^\n]+))? -->\n).*?(<!-- end -->)", re.DOTALL)

WORDS = (SUMMARY, SHORT, *TITLES)


def filled(text: str, result: Result) -> str:
    """Return `text` with the tables of a result between its marks.

    Raises:
        InputError: there is no mark, or one with an unknown section.
    """
    unknown = [word for _, word, *_ in MARKS.findall(text) if word not in WORDS]
    if unknown or not MARKS.search(text):
        error = f"an unknown section {unknown[0]!r}" if unknown else "no '<!-- bench: SECTION -->'"
        raise InputError(f"the page has {error}; sections: {', '.join(WORDS)}")

    def fill(match: re.Match[str]) -> str:
        block = _block(match[2], match[3] or "", result)
        return f"{match[1]}{block}\n{match[4]}" if block else match[0]

    return MARKS.sub(fill, text)


def _block(word: str, shape: str, result: Result) -> str:
    """The tables of a section in markdown, and where they were measured; "" without any.

    Args:
        shape: the beginning of the shapes whose tables these are.
    """
    if word in (SUMMARY, SHORT):
        parts_of = {"": summary(result) if word == SUMMARY else short(summary(result))}
        measured = any(record.section == "step" for record in result.records)
    else:
        of_section = (record for record in result.records if record.section == word)
        own = [record for record in of_section if record.shape.startswith(shape)]
        parts_of, measured = tables(Result(result.environment, own)), bool(own)
    if not measured:
        return ""
    parts = [f"{title}\n\n{table.markdown()}".strip() for title, table in parts_of.items()]
    parts += [f"- {line}" for line in remarks(result) if line.startswith(f"{word},")]
    return "\n\n".join([*parts, f"Measured {circumstances(result.environment)}."])


def summary(result: Result) -> Table:
    """Return a table with a line per row: step times and goals, memory, files, decoding."""
    by_row: dict[str, dict[tuple[str, str], Record]] = {}
    for record in result.records:
        if not record.failed:
            place = (record.section, record.shape.split()[0].strip(","))
            by_row.setdefault(row_label(record), {})[place] = record
    shapes = list(dict.fromkeys(s for row in by_row.values() for k, s in row if k == "step"))
    lines = {name: _line(found, shapes) for name, found in by_row.items() if name != label(ITSELF)}
    lines = {name: line for name, line in lines.items() if any(line.values())}
    names = next(iter(lines.values()), {})  # all lines have the same names in the same order
    columns = [name for name in names if any(line[name] for line in lines.values())]
    return Table(["", *columns], [[n, *(line[c] for c in columns)] for n, line in lines.items()])


def short(table: Table) -> Table:
    """Return the most important columns of a summary."""
    places = [i for i, name in enumerate(table.columns) if not i or name.endswith(FIRST)]
    rows = (table.columns, *table.rows)
    columns, *others = [[row[place] for place in places] for row in rows]
    return Table(columns, others)


def _line(found: Mapping[tuple[str, str], Record], shapes: list[str]) -> dict[str, str]:
    """The cells of a row by column; "" where a value is missing."""
    line: dict[str, str] = {}
    for shape in shapes:
        step = found.get(("step", shape))
        ratio = step.ratios["time / floor"].median if step else None
        goal = step.facts.get("goal") if step else None
        line[f"{shape}: step / lower bound"] = "" if ratio is None else f"{ratio:.2f}"
        line[f"{shape}: goal"] = "" if goal is None else f"{goal:.2f}"
        over = step.ratios.get("time / LoRA") if step else None
        line[f"{shape}: step / PEFT's LoRA"] = "" if over is None else f"{over.median:.2f}"
        peak = found.get(("peak", shape))
        line[f"{shape}: peak memory / lower bound"] = format_value(
            peak.facts.get("peak / floor") if peak else None
        )
    file = found.get(("file", shapes[0])) if shapes else None
    line["adapter file (kB)"] = "" if file is None else f"{file.counts['bytes'] / 1000:,.0f}"
    decode = found.get(("generate", shapes[0])) if shapes else None
    for state in ("unmerged", "merged"):
        ratio = decode.ratios.get(f"{state} / base") if decode else None
        line[f"decoding, {state} / base model"] = "" if ratio is None else f"{ratio.median:.2f}"
    return line
