"""Tables as they are printed, where the output is a terminal and where it is not."""

import re

from petl.experiments.reports.formatting import Table, print_table


def test_a_row_is_a_line_and_columns_marked_with_an_angle_are_right_aligned(capsys):
    print_table(["name", ">count"], [["a", "1"], ["a longer [bold]name", "1,234"]])
    assert capsys.readouterr().out.splitlines() == [
        "name                 count",
        "a                        1",
        "a longer [bold]name  1,234",
    ]


def test_a_table_too_wide_for_a_narrow_terminal_is_printed_as_records(capsys, monkeypatch):
    for name, value in {"FORCE_COLOR": "1", "COLUMNS": "30", "LINES": "24"}.items():
        monkeypatch.setenv(name, value)
    print_table(
        ["name", ">count", ""], [["target_modules", "1,234", "in every layer of the model"]]
    )
    lines = [re.sub(r"\x1b\[[\d;]*m", "", x) for x in capsys.readouterr().out.splitlines()]
    assert lines[:3] == ["target_modules", "  count: 1,234", "  in every layer of the model"]


def test_a_table_in_markdown_aligns_numbers_to_the_right():
    table = Table(["method", "score"], [["lora", "1"]])
    assert table.markdown() == "| method | score |\n| --- | ---: |\n| lora | 1 |"
