"""Tables between the marks of a markdown page."""

import pytest
from bench.clocks import Spread
from bench.page import filled, short, summary
from bench.records import Record
from bench_records import MOLA, STEADY, WRONG, result

import petl

PAGE = """# Fast

Prose.
<!-- bench: step -->
old figures
<!-- end -->
More prose.
<!-- bench: dist -->
figures of another run
<!-- end -->
"""


def test_measured_sections_are_updated_and_all_else_stays():
    text = filled(PAGE, result(STEADY, MOLA, WRONG))
    assert "old figures" not in text
    assert "| mola | 1.28 (1.27-1.30) |" in text
    assert "- step, llama, mos: the loss is off by 1e-02" in text
    assert "Measured 2026-11-25T10:00:00+00:00; a processor, 1 thread(s)" in text
    assert text.startswith("# Fast\n\nProse.\n<!-- bench: step -->\n")
    assert text.endswith("<!-- bench: dist -->\nfigures of another run\n<!-- end -->\n")
    assert filled(text, result(STEADY, MOLA, WRONG)) == text


def test_a_mark_with_a_shape_has_its_table_alone():
    page = "<!-- bench: step llama -->\nold\n<!-- end -->\n"
    page += "<!-- bench: step minilm -->\nkept\n<!-- end -->\n"
    text = filled(page, result(MOLA))
    assert "old" not in text
    assert "| mola |" in text
    assert text.endswith("<!-- bench: step minilm -->\nkept\n<!-- end -->\n")


def test_the_summary_has_one_line_per_row_over_sections():
    goal = Record(
        "step",
        "llama 6 x 512",
        "mos",
        ratios={"time / floor": Spread(1.06, 1.0, 1.1), "time / LoRA": Spread(0.96, 0.9, 1.0)},
        facts={"goal": 1.08},
    )
    file = Record("file", "llama 6 x 512", "mos", counts={"bytes": 123456.0})
    decoded = {"merged / base": Spread(1.0, 1.0, 1.0)}
    decode = Record("generate", "llama, 24 tokens after 16", "mos", ratios=decoded)
    table = summary(result(STEADY, goal, file, decode))
    assert table.rows == [["mos", "1.06", "1.08", "0.96", "123", "1.00"]]
    assert table.columns[-2:] == ["adapter file (kB)", "decoding, merged / base model"]
    assert short(table).rows == [["mos", "1.06", "0.96", "123"]]


@pytest.mark.parametrize("page", ["no mark", "<!-- bench: stop -->\n<!-- end -->"])
def test_a_page_without_a_known_mark_is_refused(page):
    with pytest.raises(petl.InputError, match=r"bench: SECTION|unknown section 'stop'"):
        filled(page, result(MOLA))
