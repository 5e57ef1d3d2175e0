"""The page of the claims, and the part of a method's page that quotes its verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from claims import shrink
from claims.catalog import CLAIMS, UNTRIED
from claims.claim import EDIT, Claim, Statement
from claims.measures import ACCURACY, Measure
from claims.results import Map, Result, Scored, read_published
from claims.verdicts import NOT_YET, Verdict, verdict
from petl.experiments.reports.comparison_report import DEVIATIONS, outlying
from petl.experiments.reports.formatting import Table, duration, mean_text, number, seeds_text, size
from petl.experiments.sweeps.study import FIRST

NOT_TRIED = "not tried yet"
PAPER = "the paper's difference"  # column
OF_TRAINING = ["learning rate", "parameters", "file", "CPU time"]  # columns


# A statement in words


def judged(statement: Statement, result: Result | None) -> Verdict:
    """Return the verdict of a statement; of an unfinished one, how many of its seeds are there."""
    if result is None or statement.key not in result.estimates:
        return Verdict(NOT_TRIED if result is None else NOT_YET)
    estimate = result.estimates[statement.key]
    if not result.is_complete(statement):
        return Verdict(NOT_YET, f"{estimate.seeds} of {len(result.seeds)} seeds")
    return verdict(statement, estimate)


def difference(statement: Statement, result: Result | None) -> str:
    """Return the difference of a statement with its interval; "" without its runs.

    In points of accuracy; other measures have their unit.
    """
    if result is None or not result.is_complete(statement):
        return ""
    return statement.measure.text(result.estimates[statement.key])


def of_paper(statement: Statement) -> str:
    """Return the difference that the paper reports; "" if it has none in the same terms."""
    if statement.paper is None:
        return ""
    return f"{statement.paper:g} times" if statement.measure.ratio else f"{statement.paper:+g}"


def rule(statement: Statement) -> str:
    """Return what the statement asks of the difference."""
    measure = statement.measure
    if statement.kind == "share":
        return f"{measure.title}: below {statement.margin:g} times"
    name = "" if measure is ACCURACY else f"{measure.title}: "
    margin = f"{measure.scale * statement.margin:g}"
    if statement.kind == "equals":
        return f"{name}within ±{margin}"
    side = "below" if measure.lower else "above"
    if statement.kind == "no_worse":
        return f"{name}{side} {'+' if measure.lower else '-'}{margin}"
    return f"{name}{side} 0 (matters: {margin})"


def summary(claim: Claim, result: Result | None) -> Table:
    """Return the verdicts of a claim as a table.

    Raises:
        InputError: the results have other comparisons than the claim.
    """
    if result is not None:
        result.refuse_unknown(claim)
    quotes = any(each.paper is not None for each in claim.statements)
    rows = []
    for statement in claim.statements:
        found = judged(statement, result)
        row = [statement.says, found.word, difference(statement, result)]
        row += [of_paper(statement)] if quotes else []
        rows.append([*row, rule(statement), found.takes])
    unit = "difference (points)" if claim.measures == [ACCURACY] else "difference"
    columns = ["statement", "verdict", unit, *([PAPER] if quotes else [])]
    return Table([*columns, "asked for", "would tell with a power of 0.5"], rows)


def spot_table(claim: Claim, known: Result | None, found: Mapping[str, float]) -> Table:
    """Return what a spot check found beside what is published, by contender."""
    measure, seed, rows = claim.measures[0], claim.setting.seeds[0], []
    if known is None:
        shown = [[words, measure.show(now)] for words, now in found.items()]
        return Table(["contender", f"{measure.title}, seed {seed}"], shown)
    for words, now in found.items():
        scores = known.contenders[words].scores
        spread = f"{measure.show(min(scores.values()))} to {measure.show(max(scores.values()))}"
        rows.append([words, measure.show(scores[str(seed)]), measure.show(now), spread])
    title = f"{measure.title}, seed {seed}"
    return Table(["contender", f"{title}: published", "now", "all published seeds"], rows)


def listing() -> Table:
    """Return all claims with their verdicts, and those that are left."""
    published = read_published()
    rows = [
        [claim.name, row[0], row[1], row[2]]
        for claim in CLAIMS.values()
        for row in summary(claim, published.get(claim.name)).rows
    ]
    word = "see docs/claims.md" if shrink.is_published() else NOT_TRIED
    rows.append([shrink.NAME, shrink.TITLE, word, ""])
    rows += [[each.name, each.title, NOT_TRIED, ""] for each in UNTRIED]
    return Table(["claim", "statement", "verdict", "difference (points, or as named)"], rows)


# The page


def page() -> str:
    """Return the generated part of docs/claims.md."""
    published = read_published()
    parts = ["## The verdicts", verdicts(published)]
    names = [name for name in CLAIMS if name not in published]
    names += [] if shrink.is_published() else [shrink.NAME]
    if names:
        links = ", ".join(f"[{name}](#{name})" for name in names)
        parts.append(f"{NOT_TRIED.capitalize()}, each with its experiment: {links}.")
    parts += side_by_side(published)
    for claim in CLAIMS.values():
        parts += section(claim, published.get(claim.name))
    parts += shrink.section()
    left = Table(
        ["claim", "paper", "what it takes"],
        [[each.title, each.paper, each.takes] for each in UNTRIED],
    )
    return "\n\n".join([*parts, "## Not tried yet", left.markdown()])


def verdicts(published: dict[str, Result]) -> str:
    """Return the table of the verdicts in markdown."""
    lines = [
        "| claim | statement | verdict | difference, 95 %: in points or as named |",
        "| --- | --- | --- | --- |",
    ]
    tried = [claim for claim in CLAIMS.values() if claim.name in published]
    if not tried:
        return "No claim has been tried yet; what follows is how each will be."
    for claim in tried:
        rows = summary(claim, published[claim.name]).rows
        lines += [f"| [{claim.name}](#{claim.name}) | {' | '.join(row[:3])} |" for row in rows]
    return "\n".join(lines)


def side_by_side(published: dict[str, Result]) -> Iterator[str]:
    """Yield the paragraphs that compare the contenders of all claims with one setting.

    Edited contenders and those without all of their seeds are left out.
    """
    titles = {claim.setting.name: claim.setting.title for claim in CLAIMS.values()}
    for name, title in titles.items():
        claims = [c for c in CLAIMS.values() if c.setting.name == name]
        claims = [c for c in claims if c.name in published and c.measures[0] is ACCURACY]
        if len(claims) < 2:
            continue
        found: dict[str, tuple[float, list[str]]] = {}
        for claim in claims:
            result = published[claim.name]
            for words, each in result.contenders.items():
                if EDIT not in words and len(each.scores) == len(result.seeds):
                    score = mean_of(ACCURACY, each.scores)
                    row = [claim.labels[words], claim.name, score, *of_training(each)]
                    found.setdefault(words, (fmean(each.scores.values()), row))
        rows = [row for _, row in sorted(found.values(), key=lambda each: -each[0])]
        yield f"## All contenders on {name}, by score"
        yield (
            f"The task: {title}. All have the same rows, and learning rates that are chosen alike: "
            "mean and standard deviation over the seeds of the claim. Whether two of them differ "
            "is what the statements tell, which compare them row by row."
        )
        yield Table(["contender", "claim", ACCURACY.title, *OF_TRAINING], rows).markdown()


def section(claim: Claim, result: Result | None) -> Iterator[str]:
    """Yield the paragraphs of a claim."""
    yield f"## {claim.name}"
    yield f"**{claim.title}.**"
    source = f"The paper ({claim.paper})" if claim.paper else "These pages"
    yield f"{source}: {claim.paper_says}"
    yield f"The task: {claim.setting.title}."
    if result is None:
        yield f"{NOT_TRIED.capitalize()}: `python scripts/claims.py {claim.name}`, {cost(claim)}."
        yield "\n".join(f"- {each.says}" for each in claim.statements)
    elif any(map(result.is_complete, claim.statements)):
        yield f"![Intervals of the differences](assets/claims/{claim.name}.svg)"
    if result is not None and result.curves:
        yield f"![Validation losses by step](assets/claims/{claim.name}-curves.svg)"
    if result is not None:
        yield summary(claim, result).markdown()
    if result is not None and result.contenders:
        yield contenders(claim, result).markdown()
        if claim.since:
            yield f"In brackets: the difference from {claim.labels[claim.since]!r}."
        yield from (table for each in result.maps for table in heat_map(each))
    limits = [
        *at_the_edge(claim, result),
        *far_off(claim, result),
        *claim.setting.limits,
        *claim.limits,
    ]
    yield "\n".join(["What this does not cover:\n", *(f"- {each}" for each in limits)])
    if result is not None and result.environment:
        yield "\n".join(f"- {key}: {value}" for key, value in circumstances(result))


def cost(claim: Claim) -> str:
    """Return the number of runs of a claim that shares none with another."""
    setting, count, edited = claim.setting, len(claim.trained), len(claim.edited)
    tuning = count * min(FIRST, len(setting.rates)) if len(setting.rates) > 1 else 0
    runs = f"{tuning} or more runs that choose learning rates and " if tuning else ""
    runs += f"{count * len(setting.seeds)} that count"
    return f"{runs}, {edited * len(setting.seeds)} edits of them" if edited else runs


def contenders(claim: Claim, result: Result) -> Table:
    """Return scores, learning rates and sizes of the contenders that have finished runs."""
    rows = []
    for words, label in claim.labels.items():
        found = result.contenders.get(words)
        if found is not None:
            rows.append([label, *cells(claim, found, result)])
    main, *others = claim.measures
    others = [each.title for each in others]
    return Table(["contender", main.title, *others, *OF_TRAINING], rows)


def cells(claim: Claim, found: Scored, result: Result) -> list[str]:
    """Return the cells of a contender."""
    main, *others = claim.measures
    scores, planned = mean_of(main, found.scores), len(result.seeds)
    if len(found.scores) < planned:
        scores += f" ({len(found.scores)} of {planned} seeds)"
    more = [mean_of(each, found.measured[each.name]) for each in others]
    since = result.contenders.get(claim.since)
    if since is not None and since is not found:
        pairs = [(found.measured[each.name], since.measured[each.name]) for each in others]
        rises = [fmean(now.values()) - fmean(then.values()) for now, then in pairs]
        more = [f"{cell} ({rise:+.3f})" for cell, rise in zip(more, rises, strict=True)]
    return [scores, *more, *of_training(found)]


def of_training(found: Scored) -> list[str]:
    """Return the cells of OF_TRAINING for a contender."""
    file, time = size(found.bytes), duration(found.cpu_seconds)
    rate = "of each" if found.rate is None else number(found.rate)
    return [rate, f"{found.parameters:,}", file, time]


def mean_of(measure: Measure, values: dict[str, float]) -> str:
    """Return the mean over seeds; of scores in points with the standard deviation."""
    found = list(values.values())
    in_points = measure.unit == ACCURACY.unit
    return mean_text(measure.name, found) if in_points else measure.show(fmean(found))


def at_the_edge(claim: Claim, result: Result | None) -> list[str]:
    """Return a sentence on learning rates at an end of those tried, where a better one may lie."""
    edge = []
    for words, found in result.contenders.items() if result else ():
        tried = [float(rate) for rate in found.validation]
        if EDIT not in words and len(tried) > 1 and found.rate in (min(tried), max(tried)):
            edge.append(f"{claim.labels[words]} ({number(found.rate)})")
    if not edge:
        return []
    said = "Learning rates at an end of those that were tried, beyond which a better one may lie"
    return [f"{said}: {', '.join(edge)}."]


def far_off(claim: Claim, result: Result | None) -> list[str]:
    """Return a sentence on seeds that are far from the others of their contender."""
    show, found = claim.measures[0].show, []
    for words, each in result.contenders.items() if result else ():
        for seed in outlying(each.scores):
            rest = fmean(score for other, score in each.scores.items() if other != seed)
            score = show(each.scores[seed])
            found.append(f"{claim.labels[words]}, seed {seed} ({score}, the others {show(rest)})")
    said = f"Seeds more than {DEVIATIONS} standard deviations from the others"
    return [f"{said}: {'; '.join(found)}."] if found else []


def heat_map(found: Map) -> list[str]:
    """Return title and table of a heat map."""
    rows = [
        [name, *("" if value is None else number(value, 3) for value in row)]
        for name, row in zip(found.rows, found.cells, strict=True)
    ]
    title = f"{found.title}: {found.unit}, by layer from 0. {found.meaning}".rstrip()
    return [title, Table(["", *found.columns], rows).markdown()]


def circumstances(result: Result) -> list[tuple[str, str]]:
    """Return command, settings, seeds, machine, versions and time, by label."""
    given = result.environment
    packages = ", ".join(f"{name} {version}" for name, version in given["packages"].items())
    return [
        ("command", f"`{given['command']}`"),
        ("settings", f"`{' '.join(result.settings)}`"),
        ("seeds", seeds_text(result.seeds)),
        ("machine", "; ".join(given["machines"])),
        ("commit", ", ".join(given["commits"])),
        ("packages", packages),
        ("measured", f"{given['runs']} runs, {given['started'][0]} to {given['started'][1]}"),
    ]


# Pages of the methods


def quoted(name: str) -> str:
    """Return the verdicts of the statements about a method, or of the claims of a how-to.

    Raises:
        KeyError: there is no claim about it.
    """
    published = read_published()
    claims = [claim for claim in CLAIMS.values() if name in claim.pages]
    if not claims:
        raise KeyError(f"no claim is about {name}")
    links = ", ".join(f"[{claim.name}](../claims.md#{claim.name})" for claim in claims)
    rows: list[Sequence[str]] = []
    for claim in claims:
        if claim.name in published:
            found = zip(claim.statements, summary(claim, published[claim.name]).rows, strict=True)
            about = set[str]().union(*map(methods_of, claim.statements))
            rows += [row[:3] for s, row in found if name not in about or name in methods_of(s)]
    if not rows:
        return f"Not tried yet. What will be, and how: {links}."
    columns = ["statement", "verdict", "difference, 95 %: in points or as named"]
    table = Table(columns, [list(row) for row in rows])
    return f"{table.markdown()}\n\nHow they were tried: {links}."


def listed() -> list[dict[str, Any]]:
    """Return the verdicts that `petl methods` lists, as in petl/cli/catalog/verdicts.json."""
    published = read_published()
    return [
        {
            "claim": claim.name,
            "methods": sorted(methods_of(statement) & {*claim.pages}),
            "statement": said,
            "verdict": word,
            "difference": f"{found} points" if statement.measure is ACCURACY else found,
        }
        for claim in CLAIMS.values()
        if claim.name in published
        for statement, (said, word, found, *_) in zip(
            claim.statements, summary(claim, published[claim.name]).rows, strict=True
        )
        if word != NOT_YET
    ]


def methods_of(statement: Statement) -> set[str]:
    """Return the methods that a statement compares, and their extra losses."""
    words = [each.split() for each, _ in statement.signs]
    losses = {w.removeprefix("+loss=") for each in words for w in each if w.startswith("+loss=")}
    return {each[0] for each in words} | losses
