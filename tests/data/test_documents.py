"""Folders of texts: where their passages begin and end, and which pairs they give."""

import textwrap

import pytest

from petl.data.base import read_data
from petl.data.documents import LONGEST, marked, parts_of, passages, sections

TEA = """\
---
tags: kitchen
# not: a heading
---
Before all headings. A second sentence.

# Tea

Green or black.

```bash
# boil

boil water
```

## Time ##
Three minutes.
Not five.

Cups
----

Warm them.

Drinks
======

Others.
"""


@pytest.fixture
def folder(tmp_path):
    notes = tmp_path / "notes"
    (notes / "kitchen").mkdir(parents=True)
    (notes / "kitchen" / "tea.md").write_text(TEA)
    (notes / "plain.txt").write_text("# no heading here\nA line.\n\nNext one. It has two.\n")
    (notes / ".hidden.md").write_text("# Secret\n\nHidden.\n")
    (notes / "picture.png").write_bytes(b"\x89")
    return notes


def test_passages_have_the_headings_above_them_and_their_place(folder):
    found = [
        (p.place.removeprefix(f"{folder}/"), p.heading, p.text) for p in passages("d", str(folder))
    ]
    assert found == [
        ("kitchen/tea.md:5", "", "Before all headings. A second sentence."),
        (
            "kitchen/tea.md:9",
            "Tea",
            "Green or black.\n\n```bash\n# boil\n \nboil water\n```",
        ),
        ("kitchen/tea.md:18", "Tea: Time", "Three minutes.\nNot five."),
        ("kitchen/tea.md:24", "Tea: Cups", "Warm them."),
        ("kitchen/tea.md:29", "Drinks", "Others."),
        ("plain.txt:1", "", "# no heading here\nA line.\n\nNext one. It has two."),
    ]


def test_a_query_is_the_heading_or_the_first_sentence(folder):
    pairs = [p.pair for p in passages("d", str(folder))]
    assert pairs[0] == ("Before all headings.", "A second sentence.")
    assert pairs[2] == ("Tea: Time", "Three minutes.\nNot five.")
    alone = next(iter(parts_of(next(sections([(1, "One thought", 0)])), "a.txt")))
    assert alone.pair is None


def test_long_texts_are_cut_at_paragraphs_then_sentences_then_words():
    sentence = "This is a sentence of some words. "
    paragraph = (sentence * 40).strip()  # too long for one passage
    text = f"# Long\n\nShort one.\n\n{paragraph}\n\n{'x' * 2000}\n"
    found = [
        part for each in sections(marked(text.splitlines())) for part in parts_of(each, "long.md")
    ]
    assert all(len(part.text) <= LONGEST for part in found)
    assert [part.is_first for part in found] == [True] + [False] * (len(found) - 1)
    assert found[0].text.startswith("Short one.\n\nThis is")
    whole = "".join("".join(part.text.split()) for part in found)
    assert whole == "".join(text.removeprefix("# Long").split())
    by_sentence = [part.text for part in found if "sentence" in part.text]
    assert all(part.endswith(".") for part in by_sentence)


def source(folder, **given):
    return read_data({"name": "documents", "source": "documents", "path": str(folder), **given})


def test_held_out_passages_are_queries_among_all_passages(tmp_path):
    parts = [f"## Part {i}\n\nText number {i} about {'abcdefghijkl'[i]}." for i in range(12)]
    (tmp_path / "a.md").write_text("# All\n\n" + "\n\n".join(parts) + "\n\n## Alone\n\nNo.\n")
    data = source(tmp_path, test_rows=3, task="retrieval")
    asked = [row for row in data.test if row["role"] == "query"]
    documents = {row["text"] for row in data.test if row["role"] == "document"}
    assert len(asked) == 3
    assert len(documents) == 13
    held = {row["text"] for row in asked}
    assert held.isdisjoint(data.train["query"])
    assert {*data.train["positive"]} < documents
    assert len(data.train) == 10


def test_links_that_lead_out_of_the_folder_are_not_read(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "secret.md").write_text("# Secret\n\nHidden.\n")
    (tmp_path / "notes" / "own.md").write_text("# Own\n\nSeen.\n")
    (tmp_path / "notes" / "link.md").symlink_to(tmp_path / "secret.md")
    (tmp_path / "notes" / "again.md").symlink_to("own.md")
    found = [passage.text for passage in passages("data.path", str(tmp_path / "notes"))]
    assert found == ["Seen.", "Seen."]


def test_texts_of_another_encoding_are_read(tmp_path):
    rows = [f"## Caf\u00e9 {i}\n\nTh\u00e9 num\u00e9ro {i}." for i in range(12)]
    (tmp_path / "a.md").write_bytes(textwrap.dedent("\n\n".join(rows)).encode("cp1252"))
    data = source(tmp_path, task="retrieval")
    assert any("Caf\u00e9" in query for query in data.train["query"])


@pytest.mark.parametrize(
    ("line", "heading"),
    [
        ("# a # #", "a #"),
        ("#  a#", "a#"),
        ("# a \t ###", "a"),
        ("# ##", "##"),
        ("# a ## b", "a ## b"),
        # a pattern that tries each space anew would take hours
        (f"# a{' ' * 300_000}b", f"a{' ' * 300_000}b"),
        (f"# a{' # ' * 100_000}b", f"a{' # ' * 100_000}b"),
    ],
    ids=range(7),
)
def test_a_heading_is_without_the_signs_that_close_it(line, heading):
    assert list(marked([f"{line} \n"])) == [(1, heading, 1)]
