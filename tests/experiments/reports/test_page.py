"""HTML pages and their charts as inline SVG."""

import re
from xml.etree import ElementTree

import pytest
import warm_python
from fresh_python import fresh
from matplotlib import rc_context

from petl.experiments.reports.page import (
    Point,
    cost_chart,
    line_chart,
    pareto_front,
    render_page,
)
from petl.training.features.section import Curve

SPACE = "{http://www.w3.org/2000/svg}"
RISING = Curve("train", [(10, 1.1), (20, 2.9)])


def texts(chart):
    return [e.text for e in ElementTree.fromstring(chart).iter(f"{SPACE}text")]


def numbers(chart):
    return [float(t.replace(",", "")) for t in texts(chart) if re.fullmatch(r"[\d.,]+", t or "")]


def test_a_percentage_axis_ends_at_100():
    for points in ([(1, 100.0)], [(1, 60.0), (2, 100.0)]):
        chart = line_chart([Curve("a", points)], "Accuracy", x="", y="", maximum=100.0)
        assert max(numbers(chart)) == 100


@pytest.mark.parametrize("points", [[(5, 0.0)], [(5, 1.0), (6, 1.0)], [(0, -3.0)]])
def test_constant_curves_and_single_points_can_be_drawn(points):
    ElementTree.fromstring(line_chart([Curve("flat", points)], "Flat", x="step", y="value"))


def test_a_chart_depends_on_its_content_alone():
    with rc_context({"font.size": 30, "svg.hashsalt": None}):  # as a user's matplotlibrc may say
        first = line_chart([RISING], "Loss", x="step", y="loss")
    second = line_chart([RISING], "Loss", x="step", y="loss")
    assert first == second
    assert "matplotlib" not in first.replace("http://matplotlib", "")
    assert not re.search(r"\d{4}-\d\d-\d\d", first)


def test_ids_do_not_repeat_in_a_page_unless_their_content_is_the_same():
    charts = [line_chart([RISING], str(i), x="step", y="loss") for i in range(2)]
    assert not re.search(r'id="(figure|axes|text|patch)_\d', "".join(charts))


@pytest.mark.parametrize("most_expensive", [3.0, 300.0])
def test_a_cost_chart_covers_its_points_on_either_scale(most_expensive):
    points = [Point("a", 1.0, 50.0, 1.0), Point("b", most_expensive, 98.0, 4.0)]
    chart = cost_chart(
        points, "Score", x="cost", y="accuracy (%)", higher_is_better=True, maximum=100.0
    )
    assert {"Score", "cost", "accuracy (%)"} <= set(texts(chart))
    assert max(n for n in numbers(chart) if n != 300) == 100  # an error bar reaches 102


@pytest.mark.filterwarnings("error", "ignore::ResourceWarning")
def test_a_cost_chart_has_points_without_cost():
    points = [Point("free", 0.0, 50.0, 0.0), None, Point("b", 300.0, 98.0, 0.0)]
    chart = cost_chart(points, "Score", x="cost", y="accuracy", higher_is_better=True)
    assert "<title>free\naccuracy: 50\ncost: 0</title>" in chart
    assert "<title>b\naccuracy: 98\ncost: 300</title>" in chart


# any warning fails it but that of a file which another test left open


def test_the_pareto_front_is_what_no_other_point_beats():
    points = [Point("a", 1, 5, 0), Point("b", 2, 4, 0), Point("c", 3, 7, 0), Point("d", 3, 6, 0)]
    assert [p.name for p in pareto_front(points, higher_is_better=True)] == ["a", "c"]
    assert [p.name for p in pareto_front(points, higher_is_better=False)] == ["a", "b"]


def test_values_are_escaped():
    page = render_page("a <b>", "evaluation.html", data="<script>", scores=[])
    assert "<title>a &lt;b&gt;</title>" in page
    assert ">&lt;script&gt;</p>" in page


@pytest.mark.thorough
def test_matplotlib_is_imported_only_to_draw():
    code = "import sys, petl.experiments.reports.run_report; print('matplotlib' in sys.modules)"
    assert fresh(code, python=warm_python.without_peft()) == "False\n"
