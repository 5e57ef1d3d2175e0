import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from petl.data.base import read_data
from petl.data.bundled import WORDNET_FILE

SETTINGS = {
    "name": "wordnet",
    "source": "wordnet",
    "task": "classification",
    "max_length": 48,
    "train_rows": 4000,
    "test_rows": 2000,
    "seed": 13,
}


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "scripts" / "make_wordnet.py"
    spec = importlib.util.spec_from_file_location("make_wordnet", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_standard_rows_have_the_statistics_of_the_published_baselines():
    raw = read_data(SETTINGS)
    assert (len(raw.train), len(raw.test), raw.task.max_length) == (4000, 2000, 48)
    assert len(raw.task.labels) == 15
    # stated with the baselines: majority class 17.6 %, eleven test definitions also in training
    (_, most), *_ = Counter(raw.test["label"]).most_common()
    assert most / 2000 == pytest.approx(0.176)
    trained_on = set(raw.train["text"])
    assert sum(text in trained_on for text in raw.test["text"]) == 11


def test_the_complete_database_is_included_with_its_classes():
    raw = read_data({**SETTINGS, "train_rows": None, "test_rows": None})
    rows = [*raw.train, *raw.test]
    assert len(rows) == 13_767
    label_of = {row["text"]: raw.task.labels[row["label"]] for row in rows}
    assert label_of["draw air into, and expel out of, the lungs"] == "body"
    assert label_of["rain gently"] == "weather"
    assert not any('; "' in text for text in label_of)


def test_test_rows_do_not_depend_on_the_number_of_training_rows():
    few, many = (read_data({**SETTINGS, "train_rows": n}) for n in (100, None))
    assert few.test.to_dict() == many.test.to_dict()
    assert few.train.to_dict() == many.train.select(range(100)).to_dict()
    assert len(many.train) + len(many.test) == 13_767


def test_the_license_of_wordnet_is_next_to_the_rows():
    notice = WORDNET_FILE.with_name("wordnet_license.txt").read_text()
    assert notice.startswith("This software and database is being provided to you, the LICENSEE")
    assert "WordNet 3.0 Copyright 2006 by Princeton University.  All rights reserved." in notice


def test_script_reads_class_and_definition_and_leaves_examples_out(script):
    database = (
        "  1 This software and database is being provided  \n"
        "  2   \n"
        "00001740 29 v 01 breathe 0 000 01 + 02 00 | draw air; then expel it  \n"
        '02756558 43 v 01 rain 0 000 01 + 01 00 | precipitate as rain; "It rained"; "It rains"  \n'
    )
    assert script.definitions(database) == [
        ("body", "draw air; then expel it"),
        ("weather", "precipitate as rain"),
    ]
    assert script.notice(database) == "This software and database is being provided\n\n"


def test_examples_are_those_behind_the_definition(script):
    database = (
        "  1 notice\n"
        '00001740 29 v 01 breathe 0 000 | draw air; "I can breathe"; "He is alive";  \n'
        "00001741 29 v 01 rest 0 000 | be quiet  \n"
        '00001742 30 v 01 act 0 000 | do; try; "Act now!"  \n'
    )
    assert script.examples(database) == [(1, "I can breathe"), (1, "He is alive"), (3, "Act now!")]


@pytest.mark.thorough
def test_no_definition_of_a_test_example_is_trained():
    settings = {"source": "wordnet_retrieval", "task": "retrieval", "test_rows": 1000}
    raw = read_data({**SETTINGS, **settings, "train_rows": None})
    roles = Counter(raw.test["role"])
    assert roles["document"] == 13_634  # different definitions, of all 13,767 verbs
    assert roles["query"] >= 1000
    text = dict(zip(raw.test["id"], raw.test["text"], strict=True))
    relevant = {text[name] for each in raw.test["relevant"] for name in json.loads(each)}
    assert not relevant & set(raw.train["positive"])
    queries = {
        t for t, role in zip(raw.test["text"], raw.test["role"], strict=True) if role == "query"
    }
    assert not queries & set(raw.train["query"])
    assert len(raw.train) > 11_000
