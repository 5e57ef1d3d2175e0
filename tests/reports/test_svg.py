"""Curves and bars."""

import re
from xml.etree import ElementTree

import pytest

from petl.reports.svg import HEIGHT, WIDTH, Axis, Curve, bars, curves, number, round_numbers

SPACE = "{http://www.w3.org/2000/svg}"


def texts(drawn):
    return {e.text: e for e in ElementTree.fromstring(drawn).iter(f"{SPACE}text")}


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0, 0.001, [0, 0.0002, 0.0004, 0.0006, 0.0008, 0.001]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (2.31, 2.34, [2.31, 2.32, 2.33, 2.34]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, expected):
    assert round_numbers(low, high) == pytest.approx(expected)


def test_a_value_stands_where_its_share_of_the_range_is():
    axis = Axis(10, 20, start=100, end=300)
    assert [axis.place(value) for value in (10, 15, 20)] == [100, 200, 300]


def test_a_chart_names_its_axes_and_its_curves_and_stays_in_its_frame():
    lines = [Curve("train", [(10, 2.0), (20, 1.0)]), Curve("held <out>", [(20, 1.5)])]
    drawn = curves(lines, x="step", y="loss, nats a row")
    found = texts(drawn)
    assert {"step", "loss, nats a row", "train", "held <out>", "0", "20"} <= set(found)
    for element in found.values():
        assert 0 <= float(element.get("x")) <= WIDTH
        assert 0 <= float(element.get("y")) <= HEIGHT
    places = [point for path in re.findall(r'points="([^"]+)"', drawn) for point in path.split()]
    for place in places:
        x, y = map(float, place.split(","))
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT


def test_the_name_of_an_axis_stands_beside_its_numbers():
    drawn = curves([Curve("rate", [(1, 0.00015), (2, 0.00018)])], x="step", y="rate")
    found = texts(drawn)
    name, numbers = float(found["rate"].get("x")), float(found["0.00016"].get("x"))
    assert numbers - len("0.00016") * 0.64 * 13 > name + 13 / 2  # 0.64 em: a digit of a wide font


def test_a_lower_value_stands_lower_and_a_later_step_further_right():
    drawn = curves([Curve("loss", [(1, 2.0), (2, 1.0), (3, 3.0)])], x="step", y="loss")
    dots = ElementTree.fromstring(drawn).findall(f"{SPACE}circle")
    x, y = ([float(dot.get(key)) for dot in dots] for key in ("cx", "cy"))
    assert x == sorted(x)
    assert y[1] > y[0] > y[2]  # counted from the top


def test_curves_that_do_not_rise_or_have_one_point_can_be_drawn():
    for points in ([(5, 0.0)], [(5, 1.0), (6, 1.0)], [(0, -3.0)]):
        ElementTree.fromstring(curves([Curve("flat", points)], x="step", y="figure"))


def test_a_bar_tells_its_value_and_its_share():
    drawn = bars({"forward": 6.0, "data": 2.0}, unit="s")
    assert {"forward", "6 s, 75 %", "data", "2 s, 25 %"} <= set(texts(drawn))
    wide = [float(e.get("width")) for e in ElementTree.fromstring(drawn).findall(f"{SPACE}rect")]
    assert wide[0] == pytest.approx(3 * wide[1], rel=0.01)


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (0.0002, "0.0002"), (1e-6, "1e-06"), (1234567, "1,234,567"), (2.5, "2.5")],
)
def test_numbers_are_short(value, said):
    assert number(value) == said
