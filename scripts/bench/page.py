"""Tables of a result in a page that people write: each between two marks, which stay.

    <!-- bench: step -->
    ...
    <!-- end -->

The word is a section, for all its tables, or `summary`, for one line a row over several sections,
or `short`, for the first columns of that.
What a result did not measure is left as it is, so that several results may fill one page.
"""

import re
from collections.abc import Mapping

from bench.records import Record, Result
from bench.report import ITSELF as FLOOR
from bench.report import TITLES, circumstances, remarks, shown, tables
from petl.errors import InputError
from petl.reports.formatting import Table

SUMMARY, SHORT = "summary", "short"
FIRST = ("step / floor", "/ PEFT's LoRA", "adapter kB")  # ends of the names of those columns
MARKS = re.compile(r"(<!-- bench: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

WORDS = (SUMMARY, SHORT, *TITLES)


def filled(text: str, result: Result) -> str:
    """`text` with the tables of a result between its marks.

    Raises:
        InputError: there is no mark, or one of an unknown section.
    """
    strange = [word for _, word, _ in MARKS.findall(text) if word not in WORDS]
    if strange or not MARKS.search(text):
        what = f"an unknown section {strange[0]!r}" if strange else "no '<!-- bench: SECTION -->'"
        raise InputError(f"the page has {what}; there are {', '.join(WORDS)}")

    def fill(found: re.Match[str]) -> str:
        block = _block(found[2], result)
        return f"{found[1]}{block}\n{found[3]}" if block else found[0]

    return MARKS.sub(fill, text)


def _block(word: str, result: Result) -> str:
    """The tables of a section in markdown, and where they were measured; "" if there are none."""
    if word in (SUMMARY, SHORT):
        found = {"": summary(result) if word == SUMMARY else short(summary(result))}
        measured = any(record.section == "step" for record in result.records)
    else:
        own = [record for record in result.records if record.section == word]
        found, measured = tables(Result(result.environment, own)), bool(own)
    if not measured:
        return ""
    parts = [f"{title}\n\n{table.markdown()}".strip() for title, table in found.items()]
    parts += [f"- {line}" for line in remarks(result) if line.startswith(f"{word},")]
    return "\n\n".join([*parts, f"Measured {circumstances(result.environment)}."])


def summary(result: Result) -> Table:
    """One line for each row: steps on each shape, with their goals, memory, files and decoding."""
    by_row: dict[str, dict[tuple[str, str], Record]] = {}
    for record in result.records:
        if not record.failed:
            place = (record.section, record.shape.split()[0].strip(","))
            by_row.setdefault(record.row, {})[place] = record
    shapes = list(dict.fromkeys(s for row in by_row.values() for k, s in row if k == "step"))
    lines = {name: _line(found, shapes) for name, found in by_row.items() if name != FLOOR}
    lines = {name: line for name, line in lines.items() if any(line.values())}
    names = next(iter(lines.values()), {})  # each line has them all, in one order
    columns = [name for name in names if any(line[name] for line in lines.values())]
    return Table(["", *columns], [[n, *(line[c] for c in columns)] for n, line in lines.items()])


def short(table: Table) -> Table:
    """The columns of a summary that fit where space is short."""
    places = [i for i, name in enumerate(table.columns) if not i or name.endswith(FIRST)]
    rows = (table.columns, *table.rows)
    columns, *others = [[row[place] for place in places] for row in rows]
    return Table(columns, others)


def _line(found: Mapping[tuple[str, str], Record], shapes: list[str]) -> dict[str, str]:
    """The cells of a row, "" where there is no figure."""
    line: dict[str, str] = {}
    for shape in shapes:
        step = found.get(("step", shape))
        ratio = step.ratios["time / floor"].median if step else None
        goal = step.facts.get("goal") if step else None
        line[f"{shape}: step / floor"] = "" if ratio is None else f"{ratio:.2f}"
        line[f"{shape}: goal"] = "" if goal is None else f"{goal:.2f}"
        over = step.ratios.get("time / LoRA") if step else None
        line[f"{shape}: / PEFT's LoRA"] = "" if over is None else f"{over.median:.2f}"
        peak = found.get(("peak", shape))
        line[f"{shape}: peak / floor"] = shown(peak.facts.get("peak / floor") if peak else None)
    file = found.get(("file", shapes[0])) if shapes else None
    line["adapter kB"] = "" if file is None else f"{file.counts['bytes'] / 1000:,.0f}"
    decode = found.get(("generate", shapes[0])) if shapes else None
    for state in ("unmerged", "merged"):
        ratio = decode.ratios.get(f"{state} / base") if decode else None
        line[f"decoding {state} / base"] = "" if ratio is None else f"{ratio.median:.2f}"
    return line
