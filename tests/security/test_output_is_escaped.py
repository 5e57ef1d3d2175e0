"""What petl prints, and the pages that it writes, show names of strangers and obey none.

A terminal that gets OSC 52 writes to the clipboard; a markdown or HTML page may load and run.
"""

import json
import logging
import re
import sys
from html import unescape
from html.parser import HTMLParser

import pytest
import yaml
from comparable import write_run
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from omegaconf import OmegaConf
from peft import LoraConfig

from petl.cli import main
from petl.data.models.sources import ModelFolder
from petl.data.tasks.classification import Classification
from petl.errors import InputError, RunStopped, UnknownNameError, markdown, printable
from petl.experiments.reports import comparison, comparison_report
from petl.experiments.reports.formatting import Table, echo, print_table
from petl.experiments.reports.page import ASSETS
from petl.experiments.reports.run_report import write_page
from petl.system.files.paths import OnHub
from petl.training import program as app
from petl.training.runs.card_code import front_matter
from petl.training.runs.model_card import CardInfo, model_card

pytest_plugins = ["training_fixtures"]

CLIPBOARD = "\x1b]52;c;cm0gLXJmIH4=\x07"  # OSC 52
SHOWN = r"\x1b]52;c;cm0gLXJmIH4=\x07"
WRITABLE = f"a{CLIPBOARD}\x9b2J\r\u202e"
HOSTILE = WRITABLE + "\ud800"  # which no file of a run may contain
MARKUP = "[x](http://evil/) <img src=x onerror=alert()> **b** `c` | d $e$ [red]f[/red]"


def obeyed(text):
    """The characters of a text that a terminal would not show."""
    return [c for c in text if c not in "\n\t" and not c.isprintable() and c != "\u00ad"]


# On the terminal


def test_control_characters_are_escaped_and_text_is_kept():
    assert printable(HOSTILE) == rf"a{SHOWN}\x9b2J\r\u202e\ud800"
    assert printable("two\nlines\tand é, 中文, 👩‍👧, नि") == "two\nlines\tand é, 中文, 👩‍👧, नि"
    assert printable(printable(HOSTILE)) == printable(HOSTILE)


@pytest.mark.parametrize("kind", [InputError, UnknownNameError, RunStopped])
def test_messages_of_errors_are_escaped_also_in_a_traceback(kind):
    assert str(kind(f"no {CLIPBOARD}")) == f"no {SHOWN}"


def test_log_lines_errors_and_tracebacks_are_escaped(capsys, monkeypatch):
    monkeypatch.setattr(sys, "excepthook", None)
    app.log_to_stderr()
    logging.getLogger("petl.anything").warning("skipping %s", HOSTILE)
    app.report(HOSTILE)
    for error in (InputError(HOSTILE), FileNotFoundError(20, "no folder", HOSTILE)):
        assert app.reported(lambda error=error: raising(error)) == app.BAD_INPUT
    sys.excepthook(ValueError, ValueError(HOSTILE), None)
    lines = capsys.readouterr().err
    assert not obeyed(lines)
    assert lines.count(SHOWN) == 5


def raising(error):
    raise error


@pytest.mark.parametrize("width", [None, "30", "200"])
def test_tables_are_escaped_on_a_terminal_and_in_a_pipe(capsys, monkeypatch, width):
    if width:
        for name, value in {"FORCE_COLOR": "1", "COLUMNS": width, "LINES": "9"}.items():
            monkeypatch.setenv(name, value)
    print_table(
        [f"label{CLIPBOARD}", f">[red]{CLIPBOARD}"],
        [[HOSTILE, "[/red]"], ["x" * 40, "two\nlines"]],
        f"title {CLIPBOARD} [/b]",
    )
    out = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)  # rich's own colors
    assert not obeyed(out)
    text = re.sub(r"\s", "", out)
    assert "[/red]" in text
    assert r"two\nlines" in text
    assert f"title{SHOWN}[/b]" in text
    if width != "30":
        assert f"[red]{SHOWN}" in text


def test_lines_are_escaped(capsys):
    echo(f"saved in {HOSTILE}")
    assert capsys.readouterr().out == f"saved in {printable(HOSTILE)}\n"


def test_labels_and_texts_of_data_are_escaped(tiny, tmp_path, capsys):
    rows = [{"text": f"a {CLIPBOARD} {i}", "label": f"{'ab'[i % 2]}{CLIPBOARD}"} for i in range(8)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model = [word for word in tiny.classify if word.startswith("model")]
    files = ["data=files", f"data.train={file}", f"data.test={file}", "data.allow_overlap=true"]
    assert main.main(["data", *model, *files, "data.max_length=16"]) == 0
    written = capsys.readouterr()
    assert not obeyed(written.out)
    assert written.out.count(f"a{SHOWN}") >= 2  # in the table of labels, and in the examples


def test_paths_and_words_of_the_command_line_are_escaped(tmp_path, capsys):
    folder = tmp_path / f"run{CLIPBOARD}"
    folder.mkdir()
    for words in (["report", str(folder)], ["eval", str(folder)], ["methods", CLIPBOARD]):
        with pytest.raises(SystemExit):
            main.main(words)
    lines = capsys.readouterr().err
    assert not obeyed(lines)
    assert lines.count(SHOWN) >= 3


# Markdown


def rendered(text):
    """Tags and text of a line of markdown."""
    html = MarkdownIt().enable(["table", "strikethrough"]).renderInline(text)
    return re.findall(r"<[^>]*>", html), unescape(html)


@pytest.mark.thorough
@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from([*"ab_*`[]()!<>&|~$\\:/.w#-+1 \n\t\x1b'\"é", "www.", "http://"])))
def test_any_text_in_markdown_is_shown_as_it_is(parts):
    text = "".join(parts)
    tags, shown = rendered(markdown(text))
    assert tags == []
    assert shown == " ".join(printable(text).split())
    # in GitHub's markdown a bare address is a link, and dollars begin a formula
    assert not re.search(r"\w://|www\.|(?<!\\)(\\\\)*\$", markdown(text))


def test_usual_names_stay_readable():
    for name in ("lora train.batch_size=8", "62.5 % *", "mola+density", "a (b), c; d = -1e-3"):
        assert markdown(name) == name


def test_cells_of_a_table_stay_cells():
    table = Table(["method", MARKUP], [[MARKUP, f"a|b\n| c | {CLIPBOARD}"]]).markdown()
    html = MarkdownIt().enable("table").render(table)
    assert set(re.findall(r"<(\w+)", html)) == {"table", "thead", "tr", "th", "tbody", "td"}
    assert html.count("<td") == 2
    assert MARKUP in unescape(html)
    assert not obeyed(table)


@pytest.fixture
def hostile(tmp_path):
    """A finished run whose names and values are hostile."""
    run = write_run(tmp_path / "run", 0.5, "+method=lora", "data=files", "data.train=x.csv")
    config = OmegaConf.load(run / "config.yaml")
    config.model.name = config.data.name = config.data.train = MARKUP
    OmegaConf.save(config, run / "config.yaml")
    environment = json.loads((run / "environment.json").read_text())
    environment |= {"command": MARKUP, "processor": f"</dd><script>{WRITABLE}", "platform": MARKUP}
    environment |= {"python": "3", "processes": 1, "git": MARKUP}
    (run / "environment.json").write_text(json.dumps(environment))
    scores = json.loads((run / "scores.json").read_text())
    figures = {"trainable_parameters": 1, "tokens": 1, "unit": MARKUP, "lr": 1.0, "best_step": None}
    scores |= {**figures, "task": MARKUP, "time_split": {"</svg><script>$a$": 1.0}}
    scores["after"][MARKUP] = scores["after"]["</table>"] = 0.5
    (run / "scores.json").write_text(json.dumps(scores))
    lines = [{"step": i, "loss": 1.0, f"<script>{WRITABLE}$a$b$": 1.0} for i in (1, 2)]
    lines.append({"step": 2, "validation": {"</svg><img src=x onerror=alert()>": 0.5}})
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (run / "adapter").mkdir()
    (run / "adapter" / "README.md").write_text(f"```python\n{MARKUP}</pre><script>\n```\n")
    return run


def test_a_comparison_in_markdown_has_no_markup_of_a_run(hostile, tmp_path):
    comparisons = comparison.compare([hostile])
    comparison_report.write_page(comparisons, tmp_path / "page")
    text = (tmp_path / "page" / "results.md").read_text()
    html = MarkdownIt().enable("table").render(text)
    own = {"table", "thead", "tbody", "tr", "th", "td", "ul", "li", "h2", "p"}
    assert set(re.findall(r"<(\w+)", html)) <= own
    assert MARKUP in unescape(html)
    assert not obeyed(text)


# HTML


class Tags(HTMLParser):
    """The tags of a page, and attributes that could run or load something."""

    def __init__(self, page):
        super().__init__()
        self.found, self.active = set(), []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.active += [(k, v) for k, v in attrs if k.startswith("on") or k in ("src", "href")]


@pytest.mark.thorough
def test_pages_have_no_markup_of_a_run(hostile, tmp_path):
    (hostile / '"><script>.png').write_bytes(b"\x89PNG")
    script = (ASSETS / "page.js").read_text()
    pages = [write_page(hostile)]
    pages += comparison_report.write_page(comparison.compare([hostile]), tmp_path / "page")
    for page in pages:
        # a page has petl's own script, as it is in the package, and no other
        text = page.read_text().replace(f"<script>\n{script}</script>", "", 1)
        tags = Tags(text)
        assert not {"script", "iframe", "object", "b"} & tags.found
        loaded = [v for k, v in tags.active if not v.startswith("data:image/png;base64,")]
        # parts of the same chart, and links to files beside the page: no scheme, no other host
        assert [v for v in loaded if not v.startswith("#") and (":" in v or "//" in v)] == []
        assert not obeyed(text)
    assert {"svg", "table", "img"} <= Tags(pages[0].read_text()).found


# Model cards


def test_a_model_card_has_no_markup_of_files(tmp_path):
    name = f"---\nlicense: mit\n{MARKUP}: {{'{CLIPBOARD}"
    task = Classification(classes=["```\n# title", HOSTILE], max_length=8)
    source = ModelFolder(name=name, path=str(tmp_path), source="path", dtype="float32")
    named = {key: {"name": name, "schedule": name} for key in ("method", "model", "data", "train")}
    after = {f"{name}|": 0.5, "accuracy": float("nan"), "loss": 2.0, "rows": 4.0}
    command = f"petl train data.text='{name.replace(chr(39), '')}' '```' '\n```\n# x'"
    environment = {"command": command, "device": name, "processor": name, "packages": {name: name}}
    base, config = OnHub(f"{name}/x", name), LoraConfig(target_modules=[name])
    scores = {"after": after, "metric": name}
    of_run = (base, named, scores, environment)
    text = model_card(CardInfo(task, source, config, *of_run, run_names=[name] * 3))
    assert not obeyed(text)
    _, header, body = text.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert {"library_name", "pipeline_tag", "tags", "metrics", "model-index"} == fields.keys()
    (index,) = fields["model-index"]
    assert index["name"] == " · ".join([name] * 3)
    assert [m["value"] for m in index["results"][0]["metrics"]] == [0.5, 2.0]  # no NaN
    html = MarkdownIt().render(body)
    assert set(re.findall(r"<(\w+)", html)) == {"h1", "h2", "p", "pre", "code", "ul", "li"}
    code, line = re.findall(r"<code class[^>]*>(.*?)</code>", html, re.DOTALL)
    compile(unescape(code), "README.md", "exec")
    assert line.count("\n") == 1
    assert markdown(name) in body


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_any_name_in_front_matter_is_read_back(name):
    text = front_matter({"base_model": name})
    assert yaml.safe_load(text.split("---\n")[1]) == {"base_model": name}
    assert text.count("\n---\n") == 1
