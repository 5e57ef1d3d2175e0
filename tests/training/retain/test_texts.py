"""The passages of petl/training/retain/texts.jsonl: what they promise, and that they are right."""

import gzip
import hashlib
import json
import re
import sqlite3
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

import petl
from petl.data.bundled import WORDNET_FILE
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.media import ImageClassification
from petl.errors import InputError, UnsupportedError
from petl.training.retain.texts import halves, texts_for

FILE = Path(petl.__file__).parent / "training" / "retain" / "texts.jsonl"
SHA256 = "dec95c5eeb6875f7f3895e137fb209fe38c0f5676d7ef183550428b4d528329a"
KINDS = [
    *("encyclopaedia", "narrative", "dialogue", "instructions", "news"),
    *("code", "arithmetic", "tables", "letters", "languages"),
]
ROWS = [json.loads(line) for line in FILE.read_text("utf-8").splitlines()]
TEXTS = [row["text"] for row in ROWS]

# problem (counted from 0), what its text says with a place for the result, the result
RESULTS = [
    (0, "Answer: {:.10g} crates", (14 * 23 - 17) * 38 / 19),
    (0, "is {:,.10g} kg", 305 * 38),
    (1, "takes 252 ÷ 72 = {:.10g} hours", 252 / 72),
    (1, "average is therefore {:.1f} km/h", 2 * 252 / (252 / 84 + 252 / 72)),
    (2, "the balance is {:,.2f}", 2400 * 1.05**3),
    (2, "= {:.10g}, and 2,400 times", 1.05**3),
    (2, "with it she has {:.2f}", 2400 * (1.05**3 - 1)),
    (3, "He wrote {:.10g}", 7 * (4 * 12 + 7)),
    (3, "under it {:.10g}, drew", 2 * 20 * 12 - 7 * (4 * 12 + 7)),
    (4, "that is {:.10g} hours", 1 / (1 / 6 + 1 / 4)),
    (4, "we get {:.10g} hours", 1.5 + (1 - 1.5 * (1 / 6 + 1 / 4)) * 6),
    (5, "the final price is {:.2f}", 180 * 0.75 * 0.9),
    (5, "or {:.1f} per cent", 100 * (1 - 0.75 * 0.9)),
    (6, "198 = {:.10g} square metres", (18 + 3) * (11 + 3) - 18 * 11),
    (6, "order {:.10g}. At", 4 * 96 + 20),
    (6, "they cost {:,.2f}", 404 * 4.2),
    (7, "may add: {:.10g}/132", 132 * (5 / 12 * 4 / 11 + 7 / 12 * 6 / 11)),
    (7, "would find {:.10g}/144", 5 * 5 + 7 * 7),
    (8, "So x = {:.10g}.", (34 - 3 * 6) / (3 - 1)),
    (8, "in {:.10g} years, and Helen 56", 34 - 2 * 6),
    (9, "so far is 366 ÷ 5 = {:.10g}", (72 + 65 + 81 + 58 + 90) / 5),
    (9, "366 = {:.10g} points, and this is the score", 6 * 75 - (72 + 65 + 81 + 58 + 90)),
    (9, "about {:.1f}", (366 + 100) / 6),
    (10, "she has {:.2f} euros", 650 * 1.16 * 0.98 - 512.4),
    (10, "191.97 = {:.2f} pounds", 650 - (650 * 1.16 * 0.98 - 512.4) / 1.18),
    (11, "or {:,.10g} litres", 3 * 3 * 3.14 * 7 * 1000),
    (11, "get {:,.10g} litres a day", 860 * 115 * 1.08),
    (11, "with {:.10g} litres to spare", 197_820 - 2 * 860 * 115),
]


def of_kind(kind: str) -> list[dict[str, str]]:
    return [row for row in ROWS if row["kind"] == kind]


def in_language(language: str) -> list[str]:
    return [row["text"] for row in ROWS if row.get("language") == language]


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_the_file_is_the_one_that_figures_refer_to_and_small():
    data = FILE.read_bytes()
    assert hashlib.sha256(data).hexdigest() == SHA256
    assert len(gzip.compress(data)) <= 60_000


def test_the_kinds_follow_in_turn():
    assert [row["kind"] for row in ROWS] == KINDS * 12
    assert all({"kind", "text"} <= row.keys() <= {"kind", "text", "language"} for row in ROWS)


def test_each_language_has_its_share():
    languages = Counter((row["kind"], row["language"]) for row in ROWS if "language" in row)
    code = dict.fromkeys(("python", "c", "javascript", "sql"), 3)
    other = dict.fromkeys(("de", "fr", "es"), 4)
    assert languages == {("code", name): n for name, n in code.items()} | {
        ("languages", name): n for name, n in other.items()
    }


def test_passages_are_of_one_length():
    for row in ROWS:
        least = 60 if row["kind"] in ("code", "tables") else 100
        assert least <= len(row["text"].split()) <= 200, row["text"][:60]


def test_no_sentence_stands_in_two_passages():
    seen: dict[str, int] = {}
    for number, text in enumerate(TEXTS):
        for sentence in re.split(r"(?<=[.!?])\s+|\n", text):
            key = " ".join(words(sentence))
            if len(key.split()) >= 4:
                assert seen.setdefault(key, number) == number, key


def phrases(text: str) -> set[tuple[str, ...]]:
    """All sequences of five words."""
    spoken = words(text)
    return set(zip(*(spoken[i:] for i in range(5)), strict=False))


def test_few_phrases_stand_in_two_passages():
    spoken = (phrases(row["text"]) for row in ROWS if row["kind"] != "code")
    passages = Counter(chain.from_iterable(spoken))
    assert sum(count > 1 for count in passages.values()) <= 5


def test_no_gloss_of_wordnet_stands_in_a_passage():
    written = set().union(*map(phrases, TEXTS))
    with gzip.open(WORDNET_FILE, "rt", encoding="ascii") as lines:
        glosses = [phrases(line.rpartition("\t")[2]) for line in lines]
    assert sum(map(bool, glosses)) > 5_000
    assert not [gloss for gloss in glosses if gloss and gloss <= written]


@pytest.mark.parametrize("code", in_language("python"))
def test_python_runs(code):
    exec(compile(code, "passage", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("code", in_language("sql"))
def test_sql_runs(code):
    sqlite3.connect(":memory:").executescript(code)


@pytest.mark.parametrize(("problem", "phrase", "result"), RESULTS)
def test_results_are_right(problem, phrase, result):
    assert phrase.format(result) in of_kind("arithmetic")[problem]["text"]


def test_each_problem_has_a_result_that_is_checked():
    assert {problem for problem, *_ in RESULTS} == set(range(12))


def test_a_run_is_not_measured_on_texts_that_it_replayed(tmp_path):
    every = texts_for(["bundled"], CausalLM(), {})
    own = {"data": "bundled", "mix": 0.1, "mix_data": None}
    kept = texts_for(["bundled"], CausalLM(), {"retain": own})
    assert kept == halves(every)[0]
    # other texts were replayed: those of them that are among these
    file = tmp_path / "letters.jsonl"
    file.write_text("".join(f"{json.dumps({'text': text.upper()})}\n" for text in every[3:7]))
    others = {"retain": {**own, "mix_data": str(file)}}
    assert texts_for(["bundled"], CausalLM(), others) == every[:3] + every[7:]
    with pytest.raises(InputError):
        texts_for([f"{tmp_path}/./letters.jsonl"], CausalLM(), others)
    with pytest.raises(UnsupportedError):
        texts_for(["bundled"], ImageClassification(classes=["a", "b"]), {})


def test_a_finished_run_is_not_measured_on_rows_that_it_trained_on(tmp_path, caplog):
    every = texts_for(["bundled"], CausalLM(), {})
    file = tmp_path / "train.jsonl"
    file.write_text("".join(f"{json.dumps({'text': f' {text} '})}\n" for text in every[2:9]))
    files = {"source": "files", "name": "files", "train": str(file), "test": str(file)}
    settings = {"data": {**files, "task": "causal_lm"}, "retain": {"data": "bundled"}}
    kept = texts_for(["bundled"], CausalLM(), settings)
    assert kept == every[:2] + every[9:]
    # files that are gone since do not keep anyone from measuring
    file.unlink()
    assert texts_for(["bundled"], CausalLM(), settings) == every
    assert "train.jsonl" in caplog.text
    gone = {"retain": {"data": "bundled", "mix": 0.1, "mix_data": str(file)}}
    assert texts_for(["bundled"], CausalLM(), gone) == every
