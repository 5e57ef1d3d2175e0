"""The documentation site, and the parts of its pages that come from the code.

    python scripts/build_docs.py           # refresh the generated parts, then build into build/site
    python scripts/build_docs.py refresh   # only refresh what is generated
    python scripts/build_docs.py check     # status 1 if a generated part is out of date
    python scripts/build_docs.py serve     # refresh, then serve on http://127.0.0.1:8000

A generated part stands between two marks, which stay; the rest of a page is written by hand:

    <!-- generated: fields mola -->
    ...
    <!-- end -->

Needs `pip install -e '.[docs]'`; refresh and check do without it.
"""

import argparse
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS, CONFIGS = ROOT / "docs", ROOT / "configs"
MARKS = re.compile(r"(<!-- generated: ([^\n]+?) -->\n).*?(<!-- end -->)", re.DOTALL)
SCRIPTS = ("bench", "chaos", "claims")  # of a checkout
# groups that a run has only if they are added with a plus
ADDED = ("drafter", "launch", "loss", "ranks", "search", "task", "tokens")
# files of groups whose settings are all listed
FULL = ("files", "hub", "wandb", "density", "distill", "nested")
COLUMN = 88  # characters of a page's column
SETTING = re.compile(r"^(?P<indent> *)(?P<key>[\w.+/]+):(?P<value> [^#]*?)?(?: *# ?(?P<note>.*))?$")


# Markdown


def cell(text: object) -> str:
    """Text for a cell of a table."""
    return str(text).replace("|", "\\|").replace("<", "&lt;").replace("\n", " ").strip()


def code(text: object) -> str:
    """Code for a cell of a table, or nothing for nothing."""
    shown = str(text).replace("|", "\\|")
    return f"`{shown}`" if shown else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; each cell is markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arxiv(paper: str) -> str:
    """A paper with its arXiv number as a link."""
    return re.sub(r"arXiv:(\d+\.\d+)", r"[arXiv:\1](https://arxiv.org/abs/\1)", paper)


def number(count: int | str) -> str:
    return f"{count:,}" if isinstance(count, int) else cell(count)


# Parts about methods

NEW_PAGE = """\
# {name}

{summary}

## At a glance

<!-- generated: facts {name} -->
<!-- end -->

## What it works with

<!-- generated: support {name} -->
<!-- end -->

## Fields

<!-- generated: fields {name} -->
<!-- end -->

## Notes in the source

<!-- generated: source {name} -->
<!-- end -->
"""


def own_methods() -> list[str]:
    """The methods that have a page: LoRA as the baseline, then petl's own by name."""
    import petl
    from petl.methods import BUILT_IN

    return ["lora", *(name for name in BUILT_IN if petl.method(name).by == "petl")]


def add_missing_pages() -> None:
    """Write a page for each method that has none; its text is then written by hand."""
    import petl

    for name in own_methods():
        page = DOCS / "methods" / f"{name}.md"
        if not page.exists():
            page.write_text(NEW_PAGE.format(name=name, summary=petl.method(name).summary))


def facts(name: str) -> str:
    """What the registry knows of a method: paper, use, learning rate, parameters, support."""
    import petl
    from petl.cli.catalog.reference import counted
    from petl.core.support import Capability

    entry, (count, model) = petl.method(name), counted(name)
    rows = [
        ("paper", arxiv(cell(entry.paper))),
        ("command line", cell(entry.lacking(Capability.TRAIN)) or f"`petl train +method={name}`"),
        ("from code", f'`petl.wrap(model, "{name}", ...)`'),
        ("implemented by", entry.by),
        ("default learning rate", f"{entry.lr:g} (`train.lr`)"),
        (
            "trainable parameters",
            f"{number(count)} on {cell(model)}, default settings",
        ),
    ]
    return table(["", ""], rows)


def fields(name: str) -> str:
    """The fields of a method or loss: type, default, preset of the YAML, meaning."""
    from petl.experiments.reports.fields import fields_of
    from petl.system.settings.command_line import preset_of

    rows = []
    for field in fields_of(name, preset_of(name)):
        default = code(field.default)
        if field.preset is not None:
            default += f"<br>`petl train`: {code(field.preset)}"
        named = f"{code(field.name)}<br>{cell(field.type)}"
        rows.append([named, default, cell(field.gist)])
    return table(["field and type", "default", "meaning"], rows)


def support(name: str) -> str:
    """What a method works with, and why not with the rest."""
    from petl.cli.catalog.support import HEADINGS, row

    found = row(name)
    works = [HEADINGS[key] for key, reason in found.items() if not reason]
    lines = [f"Works with {', '.join(works)}."]
    refused = [(HEADINGS[key], reason) for key, reason in found.items() if reason]
    if refused:
        lines += ["", table(["not supported", "reason"], [(h, cell(r)) for h, r in refused])]
    return "\n".join(lines)


def source(name: str) -> str:
    """The docstring of a method's module, folded, as it is in the code."""
    import importlib

    import petl

    home = petl.get(name).__module__ if name != "lora" else "petl.methods.lora"
    packages = home.split(".")
    module = importlib.import_module(".".join(packages[:3]))
    text = (module.__doc__ or "").strip().splitlines()
    where = module.__name__.replace(".", "/")
    lines = ["", "    ```text", *(f"    {line}".rstrip() for line in text), "    ```"]
    return "\n".join([f'??? info "`{where}`"', *lines])


def methods(which: str) -> str:
    """A table of petl's own methods, or of PEFT's."""
    import petl
    from petl.cli.catalog.reference import REFERENCE, counted
    from petl.methods import BUILT_IN

    own = own_methods()
    names = own if which == "own" else [n for n in BUILT_IN if n not in own]
    rows = []
    for name in names:
        entry, (count, model) = petl.method(name), counted(name)
        shown = f"[`{name}`]({name}.md)" if which == "own" else f"`{name}`"
        flags = ["yes" if flag else "no" for flag in (entry.merges, entry.exports_lora)]
        rows.append(
            [
                shown,
                cell(entry.summary),
                number(count) + ("" if model == REFERENCE else f", on {cell(model)}"),
                *flags,
                arxiv(cell(entry.paper)),
            ]
        )
    head = ["method", "what it trains", "parameters", "merges", "LoRA export", "paper"]
    return table(head, rows)


def extras(which: str) -> str:
    """A table of the extra losses, or of the recipes."""
    from petl.cli.catalog.recipes import list_recipes, paper_of, parts_of, recipe
    from petl.system.imports.tables import LOSSES

    if which == "losses":
        rows = [
            (f"[`+loss={n}`]({n}.md)", cell(e.summary), arxiv(cell(e.paper)))
            for n, e in sorted(LOSSES.items())
        ]
        return table(["loss", "effect", "paper"], rows)
    found = [recipe(name) for name in list_recipes()]
    rows = [(f"`+method={r.name}`", cell(parts_of(r)), arxiv(cell(paper_of(r)))) for r in found]
    return table(["recipe", "is", "paper"], rows)


def claims(method: str) -> str:
    """What the papers claim and how it was tried; with a method, the verdicts for its page."""
    from claims.page import page, quoted

    return quoted(method) if method else page()


def advice(_: str) -> str:
    """Where methods differ, from the table of the grid."""
    from advice.page import page

    return page()


def retain(_: str) -> str:
    """What loses less at equal test loss, from the published curves."""
    from claims.retain import page

    return page()


# Parts about commands


class Stopped(Exception):
    """Carries the parser of a script out of it, before it does anything."""


def parser_of(script: Path) -> argparse.ArgumentParser:
    """The parser with which a script reads its command line."""

    def stop(parser: argparse.ArgumentParser, *_args: Any, **_kwargs: Any) -> None:
        raise Stopped(parser)

    names = ("parse_args", "parse_known_args", "parse_intermixed_args")
    kept = {name: getattr(argparse.ArgumentParser, name) for name in names}
    argv, sys.argv = sys.argv, [str(script)]
    try:
        for name in names:
            setattr(argparse.ArgumentParser, name, stop)
        runpy.run_path(str(script), run_name="__main__")
    except Stopped as stopped:
        return stopped.args[0]
    finally:
        sys.argv = argv
        for name, function in kept.items():
            setattr(argparse.ArgumentParser, name, function)
    raise ValueError(f"{script} reads no command line")


def described(parser: argparse.ArgumentParser) -> str:
    """A command: its description, and its arguments as a table."""
    text = (parser.description or "").strip()
    prose, _, example = text.partition("\n\n  ")
    parts = [" ".join(paragraph.split("\n")) for paragraph in prose.split("\n\n") if paragraph]
    if example:
        parts.append(_examples("  " + example))
    rows = []
    for action in parser._actions:
        if action.dest in ("help", "command"):
            continue
        value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
        names = [f"{o} {value}".strip() for o in action.option_strings] or [str(value)]
        shown = ", ".join(code(name) for name in names)
        rows.append((shown, cell(action.help % vars(action) if action.help else "")))
    if rows:
        parts.append(table(["argument", "meaning"], rows))
    return "\n\n".join(parts)


def _examples(text: str) -> str:
    """The rest of a description: indented lines are commands, others are prose."""
    parts = []
    for block in re.split(r"\n\s*\n", text.rstrip()):
        if block.startswith("  "):
            lines = [line.removeprefix("    ").removeprefix("  ") for line in block.split("\n")]
            parts.append("```bash\n" + "\n".join(lines) + "\n```")
        else:
            parts.append(" ".join(block.split("\n")))
    return "\n\n".join(parts)


def wrapped(usage: str) -> str:
    """A usage line over several lines of the page's column; an option stays with its value."""
    units = re.findall(r"\[[^\[\]]*(?:\[[^\]]*\][^\[\]]*)*\](?:\.\.\.)?|\S+", usage)
    kept = [unit.replace(" ", "\0") for unit in units]
    lines = textwrap.wrap(" ".join(kept), COLUMN, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")


def commands(_: str) -> str:
    """Every sub-command of `petl`."""
    from petl.cli.parser import parser

    whole = parser()
    (children,) = (a for a in whole._actions if isinstance(a, argparse._SubParsersAction))
    sentence, _, commands = whole.description.partition("\n\n")
    parts = [" ".join(sentence.split()), f"```text\n{commands}\n```"]
    for name, child in children.choices.items():
        arguments = child.format_usage().removeprefix("usage: ")
        usage = wrapped(" ".join(arguments.replace(" [-h]", "").split()))
        parts.append(f"### `petl {name}`\n\n```text\n{usage}\n```\n\n{described(child)}")
    return "\n\n".join(parts)


def version(_: str) -> str:
    """The version that the pages are about, one sentence."""
    import petl

    return f"These pages are of version {petl.__version__}."


def scripts(_: str) -> str:
    """The command lines of the scripts."""
    parts = []
    for name in SCRIPTS:
        path = ROOT / "scripts" / f"{name}.py"
        parts.append(f"### `python scripts/{name}.py`\n\n{described(parser_of(path))}")
    return "\n\n".join(parts)


# Parts about settings


def settings(group: str) -> str:
    """The settings of a file such as configs/train.yaml (`train`), or of the files of a group."""
    if group in ("train", "retain"):
        return _tables(CONFIGS / "train.yaml", "", under=group)
    parts = []
    for path in sorted((CONFIGS / group).glob("*.yaml")):
        plus = "+" if group in ADDED else ""
        parts.append(f"### `{plus}{group}={path.stem}`")
        if group == "search":  # its settings are those of other groups
            parts += _as_written(path.read_text().splitlines())
        else:
            parts.append(_tables(path, f"{group}.", full=path.stem in FULL))
    return "\n\n".join(filter(None, parts))


def _as_written(lines: list[str]) -> list[str]:
    """A YAML as a block of code, below the comments at its beginning."""
    lines = [line for line in lines if "@package" not in line]
    head = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    body = "\n".join(lines[head:])
    return [_text(line.lstrip("# ") for line in lines[:head]), f"```yaml\n{body}\n```"]


def _tables(path: Path, prefix: str, *, under: str = "", full: bool = True) -> str:
    """A YAML as tables; comments on lines of their own become text between them.

    Args:
        prefix: put before each setting.
        under: the key below which to read; "": all of them.
        full: whether settings without a comment are listed, too.
    """
    parts: list[str] = []
    for prose, rows in _sections(_lines(path, under), under):
        # what a configuration is called, and read by, is no setting unless a comment says so
        fixed = [row for row in rows if row[0] in ("name", "source") and not row[2]]
        shown = [row for row in rows if (full and row not in fixed) or row[2]]
        if len(shown) == 1 and not shown[0][2]:  # what explains it stands above it
            shown, prose = [[*shown[0][:2], _text(prose)]], []
        parts.append(_text(prose))
        if shown:
            cells = [(code(prefix + key), code(value), cell(note)) for key, value, note in shown]
            parts.append(table(["setting", "default", "meaning"], cells))
    return "\n\n".join(filter(None, parts))


def _lines(path: Path, under: str) -> list[str]:
    """The lines of a YAML that say something, or those below one of its keys."""
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    lines = [line for line in lines if "@package" not in line]
    if not under:
        return lines
    start = lines.index(f"{under}:") + 1
    end = next((i for i in range(start, len(lines)) if lines[i][0] != " "), len(lines))
    return lines[start:end]


def _sections(lines: list[str], under: str) -> list[tuple[list[str], list[list[str]]]]:
    """Comments on lines of their own, each with the settings below: name, default, meaning."""
    sections: list[tuple[list[str], list[list[str]]]] = [([], [])]
    place: list[str] = []  # the keys around a line
    for line in lines:
        prose, rows = sections[-1]
        bare = line.strip()
        if bare.startswith("#") and rows and len(line) - len(bare) > 12:
            rows[-1][2] += " " + bare.lstrip("# ")  # continues the comment above
        elif bare.startswith("#"):
            if rows:
                prose, rows = [], []
                sections.append((prose, rows))
            prose.append(bare.lstrip("#").removeprefix(" ").rstrip())
        elif found := SETTING.match(line):
            depth = len(found["indent"]) // 2 - bool(under)
            place = [*place[:depth], found["key"]]
            value, note = (found["value"] or "").strip(), found["note"] or ""
            if value or note:
                rows.append([".".join(filter(None, [under, *place])), value, note])
    return sections


def _text(lines: Iterable[str]) -> str:
    """Comments as paragraphs; lines of them that are indented, as blocks of code."""
    parts = []
    for is_code, group in groupby(lines, lambda line: line.startswith("  ")):
        words = [line.strip() for line in group]
        code_block = "```bash\n" + "\n".join(words) + "\n```"
        parts.append(code_block if is_code else " ".join(words).strip().replace("<", "&lt;"))
    return "\n\n".join(filter(None, parts))


# Pages

PARTS: dict[str, Callable[[str], str]] = {
    "facts": facts,
    "fields": fields,
    "support": support,
    "source": source,
    "methods": methods,
    "extras": extras,
    "claims": claims,
    "advice": advice,
    "retain": retain,
    "commands": commands,
    "scripts": scripts,
    "settings": settings,
    "version": version,
}


def filled(text: str, made: dict[str, str]) -> str:
    """`text` with what the code says between its marks; `made` keeps what was made before.

    Raises:
        KeyError: a mark asks for a part that there is not.
    """

    def fill(found: re.Match[str]) -> str:
        wanted = found[2]
        if wanted not in made:
            word, _, argument = wanted.partition(" ")
            made[wanted] = PARTS[word](argument)
        return f"{found[1]}{made[wanted]}\n{found[3]}"

    return MARKS.sub(fill, text)


def with_comments(text: str) -> str:
    """Return configs/train.yaml with the meaning of each setting of a group as its comment.

    Raises:
        ValueError: it lacks a setting, or has one that there is not.
    """
    from petl.training.retain.settings import RetainConfig
    from petl.training.runs.settings import TrainConfig

    for group, kind in (("train", TrainConfig), ("retain", RetainConfig)):
        text = _with_comments(text, group, kind)
    return text


def _with_comments(text: str, group: str, kind: type) -> str:
    meaning = {each.name: each.metadata["help"] for each in dataclasses.fields(kind)}
    before, mark, block = text.partition(f"\n{group}:\n")
    # up to the next group
    own, end, after = re.split(r"(\n(?=\w+:\n))", block, maxsplit=1)
    setting = re.compile(r"^  (\w+): (\S.*?) +# .*$", re.MULTILINE)
    listed = {name for name, _ in setting.findall(own)}
    if listed != set(meaning):
        raise ValueError(f"configs/train.yaml: {sorted(listed ^ set(meaning))} differ")
    own = setting.sub(lambda m: f"{f'  {m[1]}: {m[2]}':26} # {meaning[m[1]]}", own)
    return before + mark + own + end + after


def pages() -> dict[Path, tuple[str, str]]:
    """By page, its text and what the text should be; also of the verdicts in `petl methods`."""
    from claims.page import listed

    from petl.cli.catalog import verdicts

    made: dict[str, str] = {}
    found = {}
    for path in sorted(DOCS.rglob("*.md")):
        text = path.read_text()
        if MARKS.search(text):
            found[path] = (text, filled(text, made))
    settings = (CONFIGS / "train.yaml").read_text()
    found[CONFIGS / "train.yaml"] = (settings, with_comments(settings))
    found[verdicts.FILE] = (verdicts.FILE.read_text(), json.dumps(listed(), indent=1) + "\n")
    return found


def refresh() -> None:
    """Write everything that is generated: pages, docs/support.md, the listing of methods."""
    add_missing_pages()
    runpy.run_path(str(ROOT / "scripts" / "support.py"), run_name="__main__")
    for path, (text, current) in pages().items():
        if text != current:
            path.write_text(current)
            print(f"written: {path.relative_to(ROOT)}")


def check() -> int:
    """Name the pages whose generated parts are out of date; the exit status."""
    stale = [path for path, (text, current) in pages().items() if text != current]
    for path in stale:
        print(f"out of date: {path.relative_to(ROOT)}; run: python scripts/build_docs.py refresh")
    return 1 if stale else 0


def zensical(*words: str) -> int:
    """Run Zensical in the root of the repository, which has the code of formulas."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "zensical", *words, "--config-file", "mkdocs.yml"]
    return subprocess.run(command, cwd=ROOT, env=env).returncode


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "task", nargs="?", default="build", choices=("build", "refresh", "check", "serve")
    )
    task = parser.parse_args().task
    sys.path.insert(0, str(ROOT))
    if task == "check":
        return check()
    refresh()
    if task == "build":
        return zensical("build", "--strict", "--clean")
    return zensical("serve") if task == "serve" else 0


if __name__ == "__main__":
    sys.exit(main())
