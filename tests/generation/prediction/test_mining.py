"""Hard negatives of a file: near texts without positives, by margin and rank."""

import json
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from training_fixtures import train

import petl
from petl.adapters.export.merge import merge
from petl.adapters.export.saved_adapter import find
from petl.cli.main import main
from petl.data.files import located_rows
from petl.data.retrieval_columns import texts
from petl.data.validation import every
from petl.system.files import disk

pytest_plugins = ["task_runs"]

CORPUS = ["a green cat", "the red dog", "bird", "the red dog", "cat", "green bird", "a dog"]
PAIRS = [
    ("green", "a green cat"),
    ("green", "green bird"),
    ("the dog", "the red dog"),
    ("cat", "bird"),
]


@pytest.fixture(scope="module")
def run(families, tmp_path_factory):
    words = families("retrieval", "+method=lora", "train.steps=2", "data.query_prefix=red ")
    return train(words, tmp_path_factory.mktemp("run") / "run")


@pytest.fixture
def words(run, tmp_path):
    def write(name, rows):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
        return str(tmp_path / name)

    corpus = write("corpus.jsonl", [{"id": i, "text": text} for i, text in enumerate(CORPUS)])
    pairs = write("pairs.jsonl", [{"query": q, "positive": p} for q, p in PAIRS])
    return ["mine", str(run.path), corpus, pairs, "--out", str(tmp_path / "triples.jsonl")]


def written(words, *more, name="triples.jsonl"):
    out = str(Path(words[-1]).with_name(name))
    assert main([*words[:-1], out, *more]) == 0
    return {
        (row["query"], row["positive"]): texts(row["negatives"])
        for _, row in located_rows("FILE", [out], every)
    }


def expected(run, k, margin=None, skip=0):
    queries, documents = (
        petl.embed(run.path, texts, as_=role)
        for role, texts in (("query", [q for q, _ in PAIRS]), ("document", CORPUS))
    )
    unit = [each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, documents)]
    found = {}
    for i, (query, positive) in enumerate(PAIRS):
        near = unit[1] @ unit[0][i]
        out = {query, *(p for q, p in PAIRS if q == query)}
        similar = {text: n for text, n in zip(CORPUS, near, strict=True) if text not in out}
        ranked = sorted(similar, key=lambda text: -similar[text])[skip:]
        most = np.inf if margin is None else near[CORPUS.index(positive)] - margin
        own = [text for text in ranked if similar[text] <= most][:k]
        if own:
            found[query, positive] = own
    return found


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("options", "settings"),
    [
        ({}, {"k": 5}),
        ({"--k": "2", "--skip": "1"}, {"k": 2, "skip": 1}),
        ({"--margin": "0.02"}, {"k": 5, "margin": 0.02}),
        ({"--margin": "-0.1", "--skip": "2"}, {"k": 5, "margin": -0.1, "skip": 2}),
    ],
)
def test_negatives_are_the_nearest_texts_that_are_no_positives(run, words, options, settings):
    given = [word for pair in options.items() for word in pair]
    wanted = expected(run, **settings)
    assert written(words, *given) == wanted
    assert 0 < len(wanted) <= len(PAIRS)


@pytest.mark.thorough
def test_columns_may_be_called_otherwise(run, words, tmp_path, capsys):
    wanted = written(words)
    renamed = {"text": "body", "query": "asked", "positive": "answer"}
    for number in (2, 3):
        rows = map(json.loads, Path(words[number]).read_text().splitlines())
        named = ({renamed.get(name, name): value for name, value in row.items()} for row in rows)
        words[number] = str(tmp_path / f"renamed{number}.jsonl")
        Path(words[number]).write_text("\n".join(map(json.dumps, named)))
    named = ["--column", "body", "--query", "asked", "--positive", "answer"]
    assert written(words, *named, name="renamed.jsonl") == wanted
    capsys.readouterr()
    asked = ["retrieve", str(run.path), words[2], "--query", "green", "--k", "1"]
    assert main([*asked, "--column", "body"]) == 0
    assert "green" in capsys.readouterr().out
    assert main(asked) == 2
    assert "--column=NAME" in capsys.readouterr().err
    assert main(["retrieve", str(run.path), str(tmp_path), "--query", "a", "--column", "body"]) == 2
    assert "is a folder of texts" in capsys.readouterr().err


@pytest.mark.thorough
def test_vectors_of_a_file_and_a_merged_model_have_the_same_negatives(run, words, tmp_path):
    wanted = written(words)
    file = tmp_path / "vectors.npy"
    assert main(["predict", str(run.path), words[2], "--out", str(file)]) == 0
    assert written(words, "--vectors", str(file), name="again.parquet") == wanted
    merge(find(run.path), tmp_path / "merged", None)
    assert written([words[0], str(tmp_path / "merged"), *words[2:]], name="of_merged.csv") == wanted
    np.testing.assert_allclose(
        petl.embed(tmp_path / "merged", CORPUS, as_="query"),
        petl.embed(run.path, CORPUS, as_="query"),
        atol=1e-5,
    )


@pytest.mark.thorough
def test_a_merged_folder_is_searched_as_its_run_is(run, words, tmp_path, capsys):
    merge(find(run.path), tmp_path / "merged", None)
    capsys.readouterr()
    shown = []
    for folder in (run.path, tmp_path / "merged"):
        assert main(["retrieve", str(folder), words[2], "--query", "green", "--k", "2"]) == 0
        shown.append(capsys.readouterr().out)
    assert "green" in shown[0]
    assert shown[1] == shown[0]


def test_no_input_is_replaced_and_a_full_disk_is_named(words, tmp_path, capsys, monkeypatch):
    file = tmp_path / "vectors.parquet"
    file.write_bytes(b"x")
    for taken, more in ((words[2], []), (words[3], []), (file, ["--vectors", str(file)])):
        before = Path(taken).read_bytes()
        (tmp_path / "link.jsonl").unlink(missing_ok=True)
        (tmp_path / "link.jsonl").symlink_to(taken)
        for out in (taken, tmp_path / "link.jsonl"):
            assert main([*words, *more, "--out", str(out)]) == 2
            assert f"--out={out} is the file that is read" in capsys.readouterr().err
        assert Path(taken).read_bytes() == before
    monkeypatch.setattr(disk, "create", lambda _: Path("/dev/full").open("wb"))  # noqa: SIM115
    out = tmp_path / "full.jsonl"
    assert main([*words, "--out", str(out)]) == 1
    assert f"cannot write {out}: No space left" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({3: '{"query": "a"}'}, [], "no column 'positive'"),
        ({3: '{"query": "a", "positive": " "}'}, [], "line 1: positive is empty"),
        ({2: '{"text": "green bird"}'}, ["--skip", "9"], "lower margin or skip"),
        ({}, ["--margin", "x"], "x"),
    ],
)
def test_files_without_negatives_are_refused(words, tmp_path, capsys, change, more, message):
    for place, text in change.items():
        file = tmp_path / f"changed-{place}.jsonl"
        file.write_text(text)
        words[place] = str(file)
    with suppress(SystemExit):  # of argparse
        assert main([*words, *more]) == 2
    assert message in capsys.readouterr().err
    assert not Path(words[-1]).exists()
