"""`petl advise`: what it tries, what it keeps, and what it says."""

import csv
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import pytest
from comparable import write_run
from datasets import Dataset
from training_fixtures import Tiny, example

from petl.data.tasks.classification import Classification
from petl.errors import InputError, RunStopped
from petl.experiments.advice.advisor import AdviceRequest, Advisor
from petl.experiments.advice.candidates import at, shortlist
from petl.experiments.advice.evidence import Evidence, RowErrors, Setting, Trial
from petl.experiments.advice.rounds import finalists
from petl.experiments.advice.rows import largest_class
from petl.experiments.advice.schedule import Rung, probe_fits
from petl.experiments.reports.advised import facts_of, lines_of, verdict
from petl.training.compose import compose
from petl.training.dataloader import Splits
from petl.training.runs.run_config import read_config
from petl.training.together.runs import RunJob

pytest_plugins = ["training_fixtures"]


@pytest.fixture(scope="module")
def rows(tiny: Tiny) -> list[str]:
    """Settings of a run on 200 rows of three classes, for a small BERT."""
    rng = Random(1)
    file = tiny.folder / "many.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("text", "label"), *(example(rng) for _ in range(250))])
    data = ["data=files", f"data.train={file}", "data.test_share=0.2", "data.max_length=16"]
    model = [word for word in tiny.steady if word.startswith("model")]
    return [*model, *data, "train.batch_size=8", "train.epochs=10"]


class Faked:
    """Runs that have scores without training; a method's rank and rate give the score.

    Attributes:
        made: the folders of runs, in the order in which they were made.
        spent: processor seconds.
        stop_after: runs after which a signal comes.
    """

    def __init__(self, monkeypatch, score: Callable[..., float]) -> None:
        self.made, self.spent, self.score = [], 5.0, score
        self.stop_after: int | None = None
        self.more: Any = {}  # of scores.json; or a function of the steps
        self.fails: Callable[[str], bool] = lambda name: False  # by last/... or trials/...
        monkeypatch.setattr("petl.experiments.advice.advisor.train_runs", self.train)

    def train(self, jobs: Sequence[RunJob], together: int) -> int:
        for job in jobs:
            given = dict(word.lstrip("+").split("=", 1) for word in job.words)
            method, rank = given["method"], int(given["method.r"])
            rate, steps = float(given["train.lr"]), int(given["train.steps"])
            folder = job.log.with_name(job.log.name.removesuffix(".log"))
            name = f"{folder.parent.name}/{folder.name}"
            if len(self.made) == self.stop_after:
                raise RunStopped("interrupted")
            if self.fails(name):
                job.error = "the loss is nan"
                continue
            value = self.score(method, rank, rate, steps, int(given["train.seed"]))
            seconds = 0.1 * steps
            figures = {"validation": value, "cpu_seconds": seconds, "steps": steps}
            words = [f"+method={method}", f"train.lr={rate:g}"]
            more = self.more(steps) if callable(self.more) else self.more
            write_run(folder, 0.0, *words, **figures, **more)
            self.made.append(name)
            self.spent += 1 + seconds
        return 0

    def advise(self, folder: Path, overrides: list[str], cost: float = 2.0, **more):
        """The advice; trials start without a run of theirs."""
        request = AdviceRequest(overrides, folder, cost, **more)
        unused = [lambda cfg, bases: iter(())] * 2
        return Advisor(request, *unused, lambda: self.spent).run()


def by_rate(method, rank, rate, steps, seed):
    """LoRA of rate 0.003 is the best, and longer is better."""
    return 0.8 - 0.1 * abs(rate - 3e-3) / 3e-3 - 1 / steps - (method != "lora") * 0.1 + 1e-3 * seed


@pytest.fixture
def faked(monkeypatch) -> Faked:
    return Faked(monkeypatch, by_rate)


def test_the_advice_is_the_best_within_the_cost(faked, rows, tmp_path):
    found = faked.advise(tmp_path / "a", rows)
    assert (found["method"], found["rate"]) == ("lora", 0.003)
    assert found["seconds"]["spent"] <= 2 * found["seconds"]["plain_run"]
    predicted = found["predicted"]
    assert predicted["low"] < predicted["score"] < predicted["high"]
    assert found["run"] == str(tmp_path / "a" / "last" / "lora-r8-lr0.003-seed-2")
    assert [name for name in faked.made if name.startswith("last")] == [faked.made[-1]]
    # what the page and the file say is the same
    assert json.loads((tmp_path / "a" / "advice.json").read_text()) == json.loads(json.dumps(found))
    # longer rungs have fewer settings
    lengths = sorted({t["steps"] for t in found["trials"]})
    counts = [len({t["rate"] for t in found["trials"] if t["steps"] == n}) for n in lengths]
    assert counts == sorted(counts, reverse=True)


def test_the_configuration_trains_what_is_advised(faked, rows, tmp_path, monkeypatch):
    found = faked.advise(tmp_path / "a", rows)
    monkeypatch.setattr("petl.system.settings.command_line._added", [tmp_path / "a" / "configs"])
    named = read_config(compose(["+method=advised", *rows]))
    plain = read_config(compose(["+method=lora", "method.r=8", "train.lr=0.003", *rows]))
    assert named.method == plain.method
    assert named.train == plain.train
    assert found["alpha"] == plain.method["lora_alpha"]


def test_a_cost_of_one_run_has_no_last_round(faked, rows, tmp_path):
    found = faked.advise(tmp_path, rows, cost=1.0)
    assert found["run"] is None
    assert not [name for name in faked.made if name.startswith("last")]
    assert found["seconds"]["spent"] <= found["seconds"]["plain_run"]
    assert found["predicted"]["variances"]["length"] > 0


def test_from_a_cost_of_four_two_settings_have_two_seeds(faked, rows, tmp_path):
    found = faked.advise(tmp_path, rows, cost=4.0)
    last = [name for name in faked.made if name.startswith("last")]
    assert len(last) == 4
    assert {name[-1] for name in last} == {"2", "3"}
    assert found["seconds"]["spent"] <= 4 * found["seconds"]["plain_run"]


@pytest.mark.thorough
def test_a_stopped_advice_goes_on(faked, rows, tmp_path):
    whole = faked.advise(tmp_path / "whole", rows)
    made, faked.made = faked.made, []
    for stop in (0, 4, len(made) - 1):
        faked.stop_after, faked.made, faked.spent = stop, [], 5.0
        with pytest.raises(RunStopped):
            faked.advise(tmp_path / str(stop), rows)
        faked.stop_after, before, faked.spent = None, faked.made, 5.0
        found = faked.advise(tmp_path / str(stop), rows)
        assert len(faked.made) == len(set(faked.made)), "nothing is trained twice"
        assert faked.made[: len(before)] == before
        # the second start is paid for, too, and leaves less for trials that tell rates apart
        assert (found["method"], found["rank"]) == ("lora", 8)
        assert found["seconds"]["spent"] > whole["seconds"]["spent"] - 10
    again = faked.advise(tmp_path / "whole", rows)
    assert again["trials"] == whole["trials"]


def test_a_command_that_trains_nothing_spends_nothing(faked, rows, tmp_path):
    whole = faked.advise(tmp_path, rows, cost=1.0)
    assert faked.advise(tmp_path, rows, cost=1.0)["seconds"] == whole["seconds"]


@pytest.mark.thorough
def test_another_command_does_not_take_over_a_folder(faked, rows, tmp_path):
    faked.advise(tmp_path, rows)
    many = ["weight_decay=0.1", "max_grad_norm=0.5", "batch_size=4", "epochs=5"]
    for more, request, words in (
        (["train.weight_decay=0.1"], {}, "train.weight_decay=.* 0.1 here"),
        ([], {"cost": 3.0}, "cost=.* 3.0 here"),
        # also where nothing meets what is asked for
        ([], {"bytes": 10}, "bytes=null there, 10 here"),
        ([f"train.{word}" for word in many], {}, "and 1 more"),
    ):
        with pytest.raises(InputError, match=words):
            faked.advise(tmp_path, [*rows, *more], **request)


def test_the_floor_is_the_share_of_the_most_frequent_class(faked, rows, tmp_path):
    found = faked.advise(tmp_path, rows, cost=1.0)
    assert found["floor"]["linear_probe"] is None, "not for so little"
    assert "the largest class" in facts_of(found)["without an adapter"]
    # of training: on the rows for validation, another class may be more frequent
    train, held = (Dataset.from_dict({"labels": n}) for n in ([0, 0, 0, 1, 2], [1, 1, 0, 2]))
    task = Classification(classes=["a", "b", "c"])
    splits = Splits(task, lambda rows: {}, train, held, held, None)
    assert largest_class(splits) == 0.25


def test_a_prediction_that_reaches_down_to_the_floor_is_named(faked, rows, tmp_path):
    faked.score = lambda *_: 0.34
    text = facts_of(faked.advise(tmp_path / "a", rows, cost=1.0))["without an adapter"]
    assert "may add nothing" in text
    faked.score = lambda *_: 0.95
    text = facts_of(faked.advise(tmp_path / "b", rows, cost=1.0))["without an adapter"]
    assert "nothing" not in text


def test_a_linear_probe_is_made_once_where_the_cost_has_room(faked, rows, tmp_path):
    found = faked.advise(tmp_path, rows, cost=3.0)
    probe = found["floor"]["linear_probe"]
    assert 0 < probe <= 1
    # of the rows for validation, as the trials
    assert probe * found["rows"]["validation"] == pytest.approx(
        round(probe * found["rows"]["validation"])
    )
    file = tmp_path / "schedule.json"
    noted = json.loads(file.read_text())
    file.write_text(json.dumps({**noted, "probe": 0.123}))
    assert faked.advise(tmp_path, rows, cost=3.0)["floor"]["linear_probe"] == 0.123
    # a folder of a version without one stays as it is
    file.write_text(json.dumps({k: v for k, v in noted.items() if k != "probe"}))
    again = faked.advise(tmp_path, rows, cost=3.0)
    assert again["floor"]["linear_probe"] is None
    assert again["seconds"] == found["seconds"]


def test_a_probe_may_cost_a_little_of_a_plain_run_and_of_more_from_three():
    assert probe_fits(2.0, 0.04)
    assert not probe_fits(2.9, 0.1)
    assert probe_fits(3.0, 0.1)


def test_rows_that_occur_twice_and_contradict_are_counted(faked, rows, tmp_path):
    given = Path(next(word for word in rows if word.startswith("data.train"))[11:])
    lines = [*csv.DictReader(given.open())]
    texts = {}  # one row of each text
    for line in lines:
        texts.setdefault(line["text"], line["label"])
    own = list(texts.items())[:80]
    other = next(label for label in texts.values() if label != own[0][1])
    written = [*own, *own[5:9], (own[0][0].upper() + " !", other)]
    file = tmp_path / "own.csv"
    with file.open("w", newline="") as opened:
        csv.writer(opened).writerows([("text", "label"), *written])
    # of a file of test rows of its own, so that all of these are training rows
    words = [word for word in rows if not word.startswith(("data.train", "data.test"))]
    words += [f"data.train={file}", f"data.test={given}"]
    found = faked.advise(tmp_path / "a", words, cost=1.0)
    assert found["rows"]["read"] == 85
    assert (found["rows"]["repeated"], found["rows"]["contradicted"]) == (5, 2)
    assert facts_of(found)["doubtful rows"].startswith("5 of 85 training rows")


def test_too_few_rows_get_the_default_without_an_interval(faked, tiny, tmp_path):
    found = faked.advise(tmp_path, tiny.steady)
    assert found["predicted"] is None
    assert (found["method"], found["rank"], faked.made) == ("lora", 8, [])
    assert "method.r=8" in found["command"]


@pytest.mark.thorough
def test_too_few_rows_keep_constraints_and_say_what_was_not_checked(faked, tiny, tmp_path):
    found = faked.advise(tmp_path, tiny.steady, bytes=20_000, lost=0.1, seconds=5.0)
    assert found["rank"] < 8
    assert facts_of(found)["not checked"] == "--lost 0.1, --seconds 5"


def test_too_few_rows_of_another_command_leave_its_advice(faked, rows, tiny, tmp_path):
    faked.advise(tmp_path, rows, cost=1.0)
    before = (tmp_path / "advice.json").read_bytes()
    with pytest.raises(InputError):
        faked.advise(tmp_path, tiny.steady, cost=1.0)
    assert (tmp_path / "advice.json").read_bytes() == before


def test_too_few_rows_have_one_command_too(faked, tiny, tmp_path):
    first = faked.advise(tmp_path, tiny.steady)
    with pytest.raises(InputError):
        faked.advise(tmp_path, [*tiny.steady, "train.weight_decay=0.1"])
    assert json.loads((tmp_path / "advice.json").read_text()) == json.loads(json.dumps(first))


@pytest.mark.thorough
def test_no_advice_is_left_by_a_limit_that_nothing_keeps(faked, rows, tmp_path):
    faked.more = {"retained": {"drift": 0.5}}
    found = faked.advise(tmp_path, rows, lost=0.6, cost=1.0)
    assert found["request"]["lost"] == 0.6
    with pytest.raises(InputError):
        faked.advise(tmp_path, rows, lost=0.1, cost=1.0)
    assert not [*tmp_path.glob("advice.*"), *tmp_path.glob("configs")]


@pytest.mark.thorough
def test_a_trial_of_a_command_that_was_given_up_is_not_used(faked, rows, tmp_path):
    with pytest.raises(InputError):
        faked.advise(tmp_path, [*rows, "train.weight_decay=0.1"], seconds=6.5, bytes=10_000)
    (given_up,) = faked.made
    found = faked.advise(tmp_path, [*rows, "train.epochs=20"], cost=6.0)
    assert faked.made.count(given_up) == 2
    assert len(faked.made) == len(found["trials"]) + 1


def test_a_cost_that_is_not_kept_is_said(faked, rows, tmp_path, monkeypatch):
    def slow(constraints):
        faked.spent += 60
        return shortlist(constraints)

    monkeypatch.setattr("petl.experiments.advice.advisor.shortlist", slow)
    # the start takes 5 seconds, a run 1, a step 0.1; 50 test rows count as 2 steps
    found = faked.advise(tmp_path, [*rows, "train.steps=30"])
    assert found["seconds"]["spent"] > 2 * found["seconds"]["plain_run"]
    assert "65 %" in facts_of(found)["more than --cost"]


@pytest.mark.thorough
def test_edited_rows_are_those_of_another_command(faked, rows, tmp_path):
    file = tmp_path / "own.csv"
    lines = Path(next(w for w in rows if w.startswith("data.train"))[11:]).read_text().splitlines()
    own = [f"data.train={file}" if word.startswith("data.train") else word for word in rows]
    file.write_text("\n".join(lines))
    found = faked.advise(tmp_path / "a", own, cost=1.0)
    assert faked.advise(tmp_path / "a", own, cost=1.0)["trials"] == found["trials"]
    file.write_text("\n".join([*lines[:-1], lines[1]]))
    with pytest.raises(InputError):
        faked.advise(tmp_path / "a", own, cost=1.0)


@pytest.mark.thorough
def test_a_corrected_command_goes_on_in_the_same_folder(faked, rows, tmp_path):
    with pytest.raises(InputError):
        faked.advise(tmp_path, rows, seconds=6.5, cost=1.0)
    faked.more = {"retained": {"drift": 0.5}}
    with pytest.raises(InputError):
        faked.advise(tmp_path, rows, lost=0.1, cost=1.0)
    made = len(faked.made)
    found = faked.advise(tmp_path, rows, lost=0.6, cost=1.0)
    assert len(found["trials"]) >= made - 1, "those of the stricter limit count"
    assert faked.made[1:made] == list(dict.fromkeys(faked.made[1:made]))


def test_runs_that_fail_are_left_out_and_named(faked, rows, tmp_path):
    faked.fails = lambda name: "steps-20-" not in name
    found = faked.advise(tmp_path, rows)
    assert {trial["steps"] for trial in found["trials"]} == {20}
    (log,) = found["failed"]
    assert "/last/" in log
    assert facts_of(found)["the run of full length"] == f"failed, see {log}"
    faked.fails = lambda name: True
    with pytest.raises(RunStopped):
        faked.advise(tmp_path / "b", rows)


@pytest.mark.thorough
def test_trials_without_a_finite_score_are_an_error_in_words(faked, rows, tmp_path):
    faked.score = lambda *_: math.nan
    with pytest.raises(RunStopped):
        faked.advise(tmp_path, rows)


@pytest.mark.thorough
def test_the_plain_run_trains_on_all_rows_by_epochs_and_not_by_steps(faked, rows, tmp_path):
    # the start takes 5 seconds, a run 1, a step 0.1; 50 test rows count as 2 steps
    by_epochs = faked.advise(tmp_path / "a", rows, cost=1.0)["seconds"]["plain_run"]
    assert by_epochs == pytest.approx(5 + 1 + 0.1 * (250 + 2))
    faked.spent = 5.0
    by_steps = faked.advise(tmp_path / "b", [*rows, "train.steps=200"], cost=1.0)
    assert by_steps["seconds"]["plain_run"] == pytest.approx(5 + 1 + 0.1 * (200 + 2))


@pytest.mark.thorough
def test_a_full_run_that_loses_too_much_is_named(faked, rows, tmp_path):
    faked.more = lambda steps: {"retained": {"drift": 0.05 if steps < 150 else 0.5}}
    found = faked.advise(tmp_path, rows, lost=0.1)
    assert found["run"] is None
    fact, steps = facts_of(found)["--lost 0.1"], max(t["steps"] for t in found["trials"])
    assert steps == 200
    assert "lora, r 8, lr 0.003 lost 0.500 at full length" in fact
    assert "measured 0.050 at" in fact
    assert found["constraints"]["--lost 0.1"]["without"]["rate"] == 0.003 != found["rate"]


@pytest.mark.thorough
def test_lora_that_a_constraint_excludes_is_not_counted_as_tried(faked, rows, tmp_path):
    faked.score = lambda method, *_: 0.9 if method == "lora" else 0.6
    found = faked.advise(tmp_path, [*rows, "train.epochs=20"], 6.0, bytes=9_000)
    assert "lora" in {trial["method"] for trial in found["trials"]}
    assert "(lora" not in verdict(found)
    assert "LoRA is excluded" in verdict(found)


def test_predictions_are_values_that_a_score_can_have(faked, rows, tmp_path):
    faked.score = lambda *_: 1.0
    predicted = faked.advise(tmp_path, rows, cost=1.0)["predicted"]
    assert predicted["low"] < predicted["score"] == predicted["high"] == 1


@pytest.mark.thorough
def test_texts_that_are_trained_on_stay(faked, rows, tiny, tmp_path):
    model = [word for word in tiny.complete if word.startswith(("model", "data.task"))]
    words = [*model, *(word for word in rows if not word.startswith("model"))]
    words += ["retain.mix=0.1", "retain.data=bundled"]
    assert faked.advise(tmp_path, words, cost=1.0)["method"] == "lora"


@pytest.mark.thorough
def test_with_a_folder_of_the_users_one_line_is_given(faked, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("petl.system.settings.command_line._added", [tmp_path])
    found = faked.advise(tmp_path / "a", rows, cost=1.0)
    assert lines_of(found) == [found["command"]]
    assert f"--config-dir {tmp_path}" in found["command"]


@pytest.mark.thorough
def test_what_a_constraint_costs_is_tried(faked, rows, tmp_path):
    faked.score = lambda method, rank, *_: 0.5 + 0.01 * rank * (method == "lora")
    found = faked.advise(tmp_path, rows, bytes=20_000)
    assert found["rank"] < 8
    ((words, cost),) = found["constraints"].items()
    assert words == "--bytes 20,000"
    assert cost["excludes"] > 0
    assert cost["without"]["rank"] == 8
    assert cost["without"]["gain"]["center"] == pytest.approx(0.01 * (8 - found["rank"]))


@pytest.mark.thorough
def test_settings_that_lose_too_much_are_not_advised(faked, rows, tmp_path):
    faked.more = {"retained": {"drift": 0.5}}
    with pytest.raises(InputError, match=r"0\.500"):
        faked.advise(tmp_path / "a", rows, lost=0.1)
    assert faked.advise(tmp_path / "b", rows, lost=0.6)["lost"] == 0.5
    faked.more = {}
    with pytest.raises(InputError, match=r"retain\.data"):
        faked.advise(tmp_path / "c", rows, lost=0.1)


@pytest.mark.thorough
def test_a_limit_of_seconds_shortens_the_training(faked, rows, tmp_path):
    # the start takes 5 seconds, a run 1, a step 0.1: 4 are left, for 40 steps on all 200 rows
    found = faked.advise(tmp_path / "a", rows, seconds=10.0)
    assert {t["steps"] for t in found["trials"] if "/last/" in t["run"]} == {32}
    assert found["epochs"] == pytest.approx(40 / (200 / 8), rel=0.02)
    assert facts_of(found)["--seconds 10"] == "32 of 200 steps"
    assert f"train.epochs={found['epochs']}" in found["command"]
    with pytest.raises(InputError, match=r"--seconds 6\.5"):
        faked.advise(tmp_path / "b", rows, seconds=6.5)


@pytest.mark.thorough
def test_losses_are_predicted_as_losses(faked, rows, tmp_path):
    faked.more = {
        "metric": "loss",
        "higher_is_better": False,
        "validation_scores": {"loss": 1.5, "accuracy": 0.0},
        "after": None,
    }
    found = faked.advise(tmp_path, rows)
    assert found["predicted"]["low"] < found["predicted"]["score"] < found["predicted"]["high"]
    assert found["predicted"]["score"] == pytest.approx(1.5, abs=0.01)
    assert {t["validation"] for t in found["trials"]} == {1.5}


@pytest.mark.thorough
def test_real_trainings_end_in_an_adapter_and_touch_no_test_row(
    rows, tmp_path, command, monkeypatch
):
    monkeypatch.setattr("sys.argv", ["petl", "advise"])
    settings = [*rows, "train.epochs=2"]
    status, out, err = command("advise", *settings, "--need", "merge", "--out", tmp_path / "a")
    assert status == 0, err
    found = json.loads((tmp_path / "a" / "advice.json").read_text())
    assert found["command"] in out
    assert (Path(found["adapter"]) / "adapter_model.safetensors").exists()
    runs = [file.parent for file in (tmp_path / "a").rglob("scores.json")]
    assert len(runs) == len(found["trials"])
    for run in runs:
        scores = json.loads((run / "scores.json").read_text())
        assert scores["after"] is scores.get("before") is None
        assert not (run / "predictions.jsonl").exists()
    # what cannot be merged may be tried, to say what the constraint costs
    assert found["method"] != "mola"
    page = (tmp_path / "a" / "advice.html").read_text()
    assert found["command"].replace("'", "&#39;") in page
    # the same command trains nothing more
    times = {run: (run / "scores.json").stat().st_mtime_ns for run in runs}
    assert command("advise", *settings, "--need", "merge", "--out", tmp_path / "a")[0] == 0
    assert {run: (run / "scores.json").stat().st_mtime_ns for run in runs} == times


@pytest.mark.thorough
def test_a_language_model_is_predicted_by_its_loss(rows, tiny, tmp_path, command, monkeypatch):
    monkeypatch.setattr("sys.argv", ["petl", "advise"])
    model = [word for word in tiny.complete if word.startswith(("model", "data.task"))]
    data = [word for word in rows if not word.startswith("model")]
    words = [*model, *data, "train.epochs=1", "--need", "gguf", "--lost", "3"]
    status, _, err = command("advise", *words, "--cost", "1", "--out", tmp_path / "a")
    assert status == 0, err
    found = json.loads((tmp_path / "a" / "advice.json").read_text())
    assert (found["metric"], found["higher_is_better"]) == ("loss", False)
    best = min(trial["validation"] for trial in found["trials"])
    assert found["predicted"]["low"] < best < found["predicted"]["high"]
    runs = [Path(trial["run"]) for trial in found["trials"]]
    scores = [json.loads((run / "scores.json").read_text()) for run in runs]
    assert all(each["retained"]["lost"] < 3 for each in scores)


def test_a_lower_rate_takes_the_place_of_what_is_worse_and_not_of_what_ties():
    low, middle, high = (at("lora", 8, power) for power in (-1, 0, 1))
    rows = RowErrors(0.02, 0.02, 500)

    def chosen(*scores: float) -> list[Setting]:
        found = zip((low, middle, high), scores, strict=True)
        trials = [Trial(setting, 0, 20, score) for setting, score in found]
        return finalists(Evidence(trials, rows, 400), {low, middle, high}, Rung(2, 2, 60), 20)

    assert chosen(0.2, 0.5, 0.49) == [middle, high]
    assert chosen(0.2, 0.5, 0.3) == [middle, low]
