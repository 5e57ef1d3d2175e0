"""The pages in Chromium, wide and narrow, light and dark: what their style and script do.

One page has all cases in frames of their widths, so that the browser starts twice only. A script at
the end of each frame posts what it finds.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from itertools import pairwise

import pytest
from comparable import write_run

from petl.core.model.heat_map import HEAT_MAPS
from petl.experiments.reports.comparison import compare
from petl.experiments.reports.comparison_report import write_page as write_comparison
from petl.experiments.reports.run_report import write_page
from petl.system.files.disk import as_json

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not on the PATH")
PAGES = ("run", "comparison")
NARROW, WIDE = 500, 1300  # pixels
HEAT = {
    "name": "ranks",
    "title": "Ranks",
    "unit": "rank of the update",
    "rows": ["attention.self.query <i>", "output.dense"],
    "columns": [str(i) for i in range(48)],
    "cells": [[1, 9] * 24, [None, 0.5] * 24],
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    runs = folder / "runs and more"
    for seed in (0, 1):
        write_run(runs / f"lora{seed}", 0.5 + seed / 100, "+method=lora", f"train.seed={seed}")
    long_name = runs / ("mola" * 20)
    mola = write_run(long_name, 0.6, "+method=mola", adapter_parameters=2500, adapter_bytes=2**22)
    log = [{"step": step, "loss": 3 - step / 10, "lr": 0.001} for step in range(1, 9)]
    (mola / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in log))
    (mola / HEAT_MAPS).write_text(as_json([HEAT]))
    for run in runs.iterdir():
        write_page(run)
    write_comparison(compare([runs]), folder / "comparison")
    return {"run": mola / "report.html", "comparison": folder / "comparison" / "index.html"}


LOOK = """
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(Number)
      .map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const page = luminance(getComputedStyle(document.body).backgroundColor);
  const contrast = (element) => {
    const [a, b] = [luminance(getComputedStyle(element).color), page].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05);
  };
  const texts = [...document.querySelectorAll("h1, h2, p, dt, dd, a, td:first-child, summary")];
  return {
    page, overflow: document.documentElement.scrollWidth - innerWidth,
    contrast: Math.min(...texts.map(contrast)), texts: texts.length,
    folded: [...document.querySelectorAll("details")].every((each) => !each.open),
    smallest: Math.min(...[...document.querySelectorAll("figure > svg")].map(
      (svg) => svg.getBoundingClientRect().width / svg.viewBox.baseVal.width)),
  };
"""
POINTER = """
  const mark = document.querySelectorAll(".hit")[2], tip = document.querySelector(".tip");
  const before = tip.hidden, over = (on) => on.dispatchEvent(
    new PointerEvent("pointerover", { bubbles: true, clientX: 9, clientY: 9 }));
  over(mark);
  const shown = tip.textContent, hidden = tip.hidden;
  over(document.querySelector(".heat .strong"));
  const cell = tip.textContent;
  over(document.body);
  return [before, hidden, shown, cell, tip.hidden];
"""
MARKS = """
  const svg = document.querySelector("figure > svg"), frame = svg.getBoundingClientRect();
  return [...svg.querySelectorAll(".hit")].map((hit) => {
    const box = hit.getBoundingClientRect();
    return [box.left - frame.left, box.right - frame.left, box.height / frame.height,
            frame.width];
  });
"""
CLICKS = """
  const table = document.querySelector("table.sortable");
  const names = () => [...table.tBodies[0].rows].map((row) => row.cells[0].textContent.trim());
  const head = (text) => [...table.tHead.rows[0].cells].find((h) => h.textContent === text);
  const orders = [names()];
  for (const text of ["adapter file", "adapter file", "method", "parameters"]) {
    head(text).querySelector("button").click();
    orders.push(names());
  }
  return [orders, head("parameters").ariaSort, head("method").ariaSort];
"""
LINKS = "return [...document.querySelectorAll('td a')].map((a) => a.getAttribute('href'))"
BACK = "return [...document.querySelectorAll('.links a')].map((a) => a.getAttribute('href'))"
READABLE = {f"{page} {width}": (page, LOOK, width) for page in PAGES for width in (NARROW, WIDE)}
FOREIGN = ("javascript:alert(1)", "https://example.org/index.html")
CASES = {
    **READABLE,
    "pointer": ("run", POINTER, WIDE),
    "marks": ("run", MARKS, WIDE),
    "clicks": ("comparison", CLICKS, WIDE),
    "links": ("comparison", LINKS, WIDE),
    "back": ("run", BACK, WIDE, "../../comparison/index.html"),
    **{address: ("run", BACK, WIDE, address) for address in FOREIGN},
}


def results(pages, cases, *options):
    """What the script of each case returns, by name."""
    frames = []
    for i, (name, (page, script, width, *back)) in enumerate(cases.items()):
        code = f"parent.postMessage([{json.dumps(name)}, (() => {{{script}}})()], '*')"
        inspected = pages[page].with_name(f"inspected{i}.html")
        inspected.write_text(
            pages[page].read_text().replace("</body>", f"<script>{code}</script></body>")
        )
        source = inspected.as_uri() + (f"#back={back[0]}" if back else "")
        frames.append(f'<iframe src="{source}" style="width: {width}px; height: 900px"></iframe>')
    collect = """
      const found = {};
      addEventListener("message", ({ data: [name, value] }) => {
        found[name] = value;
        document.title = JSON.stringify(found);
      });
    """
    all_cases = pages["run"].parents[2] / "cases.html"
    all_cases.write_text(f"<title></title><script>{collect}</script>{''.join(frames)}")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", *options]
    command = [CHROMIUM, *flags, "--dump-dom", all_cases.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    return json.loads(unescape(re.search("<title>(.*?)</title>", dom, re.DOTALL)[1]))


@pytest.fixture(scope="module")
def light(pages):
    return results(pages, CASES)


@pytest.fixture(scope="module")
def dark(pages):
    return results(pages, READABLE, "--blink-settings=preferredColorScheme=0")


@pytest.mark.parametrize("case", READABLE)
def test_a_page_is_readable(case, light, dark):
    assert light[case]["page"] > 0.98
    assert dark[case]["page"] < 0.02
    for look in (light[case], dark[case]):
        assert look["overflow"] <= 0  # wide tables scroll, the page does not
        assert look["texts"] > 10
        assert look["contrast"] > 4.5  # WCAG's bound for text
        assert look["folded"]
        assert look["smallest"] > 0.9  # charts are not shrunk: their letters keep their size


def test_a_chart_shows_the_values_under_the_pointer(light):
    assert light["pointer"] == [
        True,
        False,
        "optimizer step 3\ntraining: 2.7",
        "attention.self.query <i> · 1: 9 rank of the update",
        True,
    ]


def test_marks_cover_the_curve(light):
    marks = light["marks"]
    assert len(marks) == 8  # one per logged step
    for (_, end, *_), (start, *_) in pairwise(marks):
        assert end == pytest.approx(start, abs=0.3)
    assert marks[0][0] > 0
    assert marks[-1][1] < marks[-1][3]
    assert all(0.4 < height < 1 for _, _, height, _ in marks)


def test_a_table_is_sorted_by_a_click_on_a_heading(light):
    orders, by_parameters, by_method = light["clicks"]
    first, *sorted_orders = [[name[:4] for name in names] for names in orders]
    assert first == ["mola", "lora", "befo"]
    assert sorted_orders == [
        ["mola", "lora", "befo"],  # 4.19 MB before 4 kB; the row without a value stays last
        ["lora", "mola", "befo"],
        ["befo", "lora", "mola"],
        ["mola", "lora", "befo"],
    ]
    assert (by_parameters, by_method) == ("descending", None)


def test_the_comparison_links_to_the_reports_and_they_link_back(pages, light):
    assert len(light["links"]) == 4  # the one run of mola twice, and two seeds of lora
    target, _, fragment = next(link for link in light["links"] if "mola" in link).partition("#")
    report = pages["comparison"].parent / target.replace("%20", " ")
    assert report.resolve() == pages["run"]
    assert fragment == f"back={CASES['back'][3]}"
    assert light["back"][0] == pages["comparison"].as_uri()


@pytest.mark.parametrize("address", FOREIGN)
def test_a_page_links_back_to_its_own_place_only(address, light):
    assert not [link for link in light[address] if ":" in link]
