"""Tables as they are printed where the output is no terminal."""

from petl.reports.formatting import print_table


def test_a_row_is_a_line_and_names_of_columns_say_how_they_are_aligned(capsys):
    print_table(["name", ">count"], [["a", "1"], ["a longer [bold]name", "1,234"]])
    assert capsys.readouterr().out.splitlines() == [
        "name                 count",
        "a                        1",
        "a longer [bold]name  1,234",
    ]


def test_a_title_that_is_wider_than_the_table_stays_one_line(capsys):
    title = "increlora · density · whisper_random · audio_folder [x]"
    print_table(["a"], [["1"]], title)
    assert capsys.readouterr().out.splitlines() == [title, "a", "1"]
