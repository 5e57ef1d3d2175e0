"""Claims: the interval and the rule of verdicts, a whole claim on a tiny model, and its pages."""

import dataclasses
import json
import math

import numpy as np
import pytest
from claims import (
    page,
    pictures,
    results,
    running,
)
from claims.claim import Claim, Setting, Shown, Statement
from claims.intervals import Estimate, estimate, half_width
from claims.measures import SECONDS
from claims.verdicts import FAILS, HOLDS, OPEN, WORSE, needed_half_width, verdict, word_of

from petl.errors import InputError, RunStopped
from petl.experiments.sweeps.study import Study
from petl.training.runs.records import read_results

pytest_plugins = ["training_fixtures", "claims_fixtures"]


# The interval


def simulated(rng, *, seeds, rows, mean, seed_sd, example_sd, rest_sd):
    """Differences of the two-way model, by seed."""
    of_example = rng.normal(0, example_sd, rows)
    return {
        s: mean + rng.normal(0, seed_sd) + of_example + rng.normal(0, rest_sd, rows)
        for s in range(seeds)
    }


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # of Student's t at 97.5 %, from printed tables
    [(1, 12.706), (2, 4.303), (4, 2.776), (7, 2.365), (10, 2.228), (30, 2.042)],
)
def test_half_width_uses_the_published_quantile(freedom, quantile):
    assert half_width(4.0, freedom) == pytest.approx(2 * quantile, abs=2e-3)


def test_with_equal_examples_it_is_the_paired_t_interval_over_seeds():
    # no example differs from another, so that only the seeds vary
    of_seed = [0.010, 0.022, 0.016, 0.004, 0.018]
    found = estimate({s: np.full(50, value) for s, value in enumerate(of_seed)})
    mean = sum(of_seed) / 5
    deviation = math.sqrt(sum((v - mean) ** 2 for v in of_seed) / 4)
    half = 2.776 * deviation / math.sqrt(5)
    assert found.interval() == pytest.approx((mean - half, mean + half), abs=1e-5)


def test_with_equal_seeds_it_is_the_interval_over_examples():
    # McNemar's normal interval: 30 examples gained, 18 lost, of 400
    D = np.array([1.0] * 30 + [-1.0] * 18 + [0.0] * 352)
    found = estimate(dict.fromkeys(range(5), D))
    assert found.mean == pytest.approx(12 / 400)
    error = math.sqrt((48 / 400 - (12 / 400) ** 2) / 400)
    low, high = found.interval()
    assert (high - low) / 2 == pytest.approx(1.966 * error, rel=3e-3)  # t of 399 degrees


def test_mean_squares_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    D = {s: rng.choice([-1.0, 0.0, 1.0], 7) for s in range(3)}
    found = estimate(D)
    S, N = 3, 7
    grand = sum(D[s][n] for s in range(S) for n in range(N)) / (S * N)
    row = [sum(D[s]) / N for s in range(S)]
    column = [sum(D[s][n] for s in range(S)) / S for n in range(N)]
    seeds = N * sum((r - grand) ** 2 for r in row) / (S - 1)
    examples = S * sum((c - grand) ** 2 for c in column) / (N - 1)
    rest = sum((D[s][n] - row[s] - column[n] + grand) ** 2 for s in range(S) for n in range(N)) / (
        (S - 1) * (N - 1)
    )
    assert found.mean == pytest.approx(grand)
    assert found.seed_square == pytest.approx(seeds)
    assert found.example_square == pytest.approx(examples)
    assert found.rest_square == pytest.approx(rest)


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    "spread",
    [
        {"seed_sd": 0.05, "example_sd": 0.3, "rest_sd": 0.3},
        {"seed_sd": 0.0, "example_sd": 0.5, "rest_sd": 0.2},
        {"seed_sd": 0.1, "example_sd": 0.0, "rest_sd": 0.4},
    ],
)
def test_intervals_cover_the_true_mean_as_often_as_they_say(spread):
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        D = simulated(rng, seeds=5, rows=150, mean=0.02, **spread)
        low, high = estimate(D).interval()
        hits += low <= 0.02 <= high
    # three standard errors of 600 draws at 95 %; the interval may be a little wide, never narrow
    assert hits / 600 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 600)


def test_predicted_width_is_that_of_more_seeds():
    # the mean width at 20 seeds, predicted from many seeds at once
    rng = np.random.default_rng(3)
    spread = {"mean": 0.0, "seed_sd": 0.05, "example_sd": 0.2, "rest_sd": 0.2}
    known = estimate(simulated(rng, seeds=400, rows=400, **spread))
    variance = 0.05**2 / 20 + 0.2**2 / 400 + 0.2**2 / (20 * 400)
    assert known.predicted_half_width(20, 400) == pytest.approx(half_width(variance, 19), rel=0.12)


def test_enough_is_the_smallest_number_of_seeds_then_of_rows():
    found = Estimate({"0": 0.01, "1": 0.03, "2": -0.01, "3": 0.0}, 1000, 0.2, 0.1)
    half = found.predicted_half_width(9, 1000)
    assert found.enough(half) == (9, 1000)
    assert found.predicted_half_width(8, 1000) > half
    rows_matter = Estimate({"0": 0.01, "1": 0.011}, 1000, 2.0, 0.1)
    seeds, rows = rows_matter.enough(0.025)
    assert rows == 8000  # at 4,000 rows no number of seeds has it
    assert rows_matter.predicted_half_width(seeds, rows) <= 0.025
    assert found.enough(0.0) is None


# The rule


@pytest.mark.parametrize(
    ("kind", "low", "high", "word"),
    [
        ("beats", 0.001, 0.03, HOLDS),
        ("beats", 0.001, 0.004, HOLDS),  # small, and real
        ("beats", -0.004, 0.009, FAILS),  # an advantage of a point is excluded
        ("beats", -0.03, -0.01, FAILS),
        ("beats", -0.004, 0.012, OPEN),
        ("equals", -0.009, 0.004, HOLDS),
        ("equals", -0.03, -0.01, FAILS),
        ("equals", 0.011, 0.03, FAILS),
        ("equals", -0.012, 0.004, OPEN),
        ("equals", -0.012, -0.004, WORSE),
        ("equals", -0.012, 0.02, OPEN),
        ("no_worse", -0.009, 0.04, HOLDS),  # a gain is no loss
        ("no_worse", 0.02, 0.04, HOLDS),
        ("no_worse", -0.03, -0.011, FAILS),
        ("no_worse", -0.03, -0.009, WORSE),
        ("no_worse", -0.03, 0.0, OPEN),
        ("share", -0.4, 0.005, HOLDS),  # the border is a logarithm
        ("share", 0.011, 0.4, FAILS),
        ("share", -0.4, 0.4, OPEN),
    ],
)
def test_an_interval_has_one_verdict(kind, low, high, word):
    assert word_of(kind, low, high, 0.01) == word


@pytest.mark.parametrize(("mean", "word"), [(0.05, HOLDS), (-0.05, FAILS)])
def test_a_known_effect_gets_its_verdict(mean, word):
    rng = np.random.default_rng(4)
    D = simulated(rng, seeds=5, rows=2000, mean=mean, seed_sd=0.005, example_sd=0.3, rest_sd=0.3)
    assert verdict(Statement("", "beats", "a", "b"), estimate(D)).word == word


def test_what_cannot_be_told_has_what_it_would_take():
    statement = Statement("", "beats", "a", "b")
    wide = Estimate({"0": 0.01, "1": 0.03, "2": -0.01}, 1000, 0.2, 0.1)
    found = verdict(statement, wide)
    assert found.word == OPEN
    assert found.takes.startswith("about ")
    assert needed_half_width("beats", 0.002, 0.01) == pytest.approx(0.008)
    assert needed_half_width("equals", 0.008, 0.01) == pytest.approx(0.002)
    assert needed_half_width("no_worse", 0.004, 0.01) == pytest.approx(0.014)
    assert needed_half_width("no_worse", -0.016, 0.01) == pytest.approx(0.006)
    near = Estimate({"0": 0.0, "1": 0.02, "2": 0.01}, 1000, 0.2, 0.1)  # on the border
    assert "too near" in verdict(dataclasses.replace(statement, kind="equals"), near).takes


# A whole claim


WIDE, THIN, MIXED = "lora method.r=4", "lora method.r=1", "mola method.num_experts=2 method.r=2"


@pytest.fixture
def claim(tiny) -> Claim:
    """A claim of three statements on a tiny model."""
    setting = Setting(
        "tiny", "a tiny task", tuple(tiny.steady), (1e-3, 1e-2), (0, 1), tuning_seeds=1
    )
    return Claim(
        name="tiny",
        title="a rank of 4 is better",
        paper="none",
        paper_says="nothing.",
        statements=(
            Statement("rank 4 beats rank 1", "beats", WIDE, THIN),
            Statement("rank 4 equals rank 1", "equals", WIDE, THIN, margin=0.5),
            Statement("the gain of MoLA is larger", "beats", MIXED, THIN, than=(WIDE, THIN)),
        ),
        setting=setting,
        labels={WIDE: "rank 4", THIN: "rank 1", MIXED: "mixture"},
        pages=("lora", "mola"),
        shown=(Shown("the load", MIXED, "expert_load"),),
        limits=("It is tiny.",),
    )


@pytest.mark.thorough
def test_a_claim_is_tried_written_and_resumed(claim, tmp_path, made, monkeypatch):
    found = running.try_claim(claim, tmp_path, "the command")
    assert len(made) == 3 * (2 + 2)  # each of three contenders: two rates, two seeds
    written = results.read(tmp_path / "tiny.json")
    assert written == found

    # the differences are those of the scores in the folders of the runs
    rank, gain = (found.estimates[claim.statements[i].key] for i in (0, 2))
    for seed in (0, 1):
        score = {
            name: read_results(tmp_path / "tiny/runs" / name / f"seed-{seed}")["after"]["accuracy"]
            for name in ("lora-r-4", "lora-r-1", "mola-num_experts-2-r-2")
        }
        wide, thin, mixed = score.values()
        assert rank.differences[str(seed)] == pytest.approx(wide - thin)
        assert gain.differences[str(seed)] == pytest.approx(mixed - wide)
        assert found.contenders[WIDE].scores[str(seed)] == wide
    tried = json.loads((tmp_path / "tiny/rates.json").read_text())
    assert found.contenders[THIN].rate == tried["lora r=1"]["taken"]
    assert found.contenders[WIDE].parameters == 4 * found.contenders[THIN].parameters
    assert found.maps[0].title == "the load"
    assert found.environment["command"] == "the command"
    assert found.environment["runs"] == 6

    # a file of a time before other measures is read
    older = json.loads((tmp_path / "tiny.json").read_text())
    for each in older["contenders"].values():
        assert each.pop("measured") == {}
    (tmp_path / "older.json").write_text(json.dumps(older))
    assert results.read(tmp_path / "older.json") == found

    # finished runs are kept
    made.clear()
    assert running.try_claim(claim, tmp_path, "the command") == found
    assert made == []

    # a spot check trains one seed of the first statement again, and finds the same
    checked = running.spot_check(claim, found, tmp_path / "quick")
    assert made == ["runs/lora-r-4/seed-0", "runs/lora-r-1/seed-0"]
    assert checked == {words: found.contenders[words].scores["0"] for words in (WIDE, THIN)}
    _, published, now, spread = page.spot_table(claim, found, checked).rows[0]
    assert published == now
    assert published in spread.split(" to ")

    # the page has the numbers of the file, the picture its verdicts
    monkeypatch.setattr(page, "CLAIMS", {"tiny": claim})
    monkeypatch.setattr(pictures, "CLAIMS", {"tiny": claim})
    shown = tmp_path / "published"
    assert pictures.publish(tmp_path, shown, tmp_path / "assets", ["tiny"]) == ["tiny"]
    monkeypatch.setattr(page, "read_published", lambda: results.read_published(shown))
    text = page.page()
    mean = rank.mean
    assert f"{100 * mean:+.2f} (" in text
    assert "It is tiny." in text
    assert "`the command`" in text
    assert "the load" in text
    words = [page.judged(each, found).word for each in claim.statements]
    picture = (tmp_path / "assets/tiny.svg").read_text()
    assert all(word in picture for word in words)
    assert words[1] in page.quoted("lora")
    with monkeypatch.context() as patch:  # a how-to quotes all statements
        patch.setattr(page, "CLAIMS", {"tiny": dataclasses.replace(claim, pages=("resume",))})
        assert all(each.says in page.quoted("resume") for each in claim.statements)
    assert claim.statements[0].says not in page.quoted("mola")
    with pytest.raises(KeyError):
        page.quoted("mos")


def test_the_difference_of_the_paper_is_shown_beside_the_measured_one(claim):
    assert "the paper's difference" not in page.summary(claim, None).columns
    first, *others = claim.statements
    told = dataclasses.replace(first, paper=-0.5)
    table = page.summary(dataclasses.replace(claim, statements=(told, *others)), None)
    assert dict(zip(table.columns, table.rows[0], strict=True))["the paper's difference"] == "-0.5"
    assert [row[3] for row in table.rows] == ["-0.5", "", ""]
    half = Statement("half", "share", WIDE, THIN, margin=0.5, measure=SECONDS, paper=0.45)
    assert page.of_paper(half) == "0.45 times"


def test_contenders_of_claims_with_one_setting_are_in_one_table(claim, monkeypatch):
    def of_scores(*values):
        by_seed = {str(seed): value for seed, value in enumerate(values)}
        return results.Scored(by_seed, 1e-3, {}, 10, 2000, 3.0)

    edited = f"{THIN} | prune drop=0.9 q=dare"
    found = {THIN: of_scores(0.4, 0.5), WIDE: of_scores(0.7, 0.5), edited: of_scores(0.9, 0.9)}
    one = results.Result("tiny", [], [0, 1], found)
    two = results.Result("more", [], [0, 1], {WIDE: found[WIDE], MIXED: of_scores(0.8)})
    labels = {**claim.labels, WIDE: "as the second claim has it"}
    claims = {"tiny": claim, "more": dataclasses.replace(claim, name="more", labels=labels)}
    monkeypatch.setattr(page, "CLAIMS", claims)
    assert list(page.side_by_side({"tiny": one})) == []
    title, _, table = page.side_by_side({"tiny": one, "more": two})
    assert title == f"## All contenders on {claim.setting.name}, by score"
    # the best first, each once; without the unfinished and the edited one
    assert [line.split(" | ")[:3] for line in table.splitlines()[2:]] == [
        [f"| {claim.labels[WIDE]}", "tiny", "60.0 ± 14.1 %"],
        [f"| {claim.labels[THIN]}", "tiny", "45.0 ± 7.1 %"],
    ]


def test_results_of_other_comparisons_are_refused(claim, tmp_path, monkeypatch):
    found = estimate({seed: np.array([0.0, 1.0]) for seed in (0, 1)})
    of_key = {
        f"accuracy: {WIDE} minus {THIN}": found,
        f"accuracy: ({MIXED} minus {THIN}) minus ({WIDE} minus {THIN})": found,
    }
    known = results.Result("tiny", [], [0, 1], estimates=of_key)
    assert [row[1] for row in page.summary(claim, known).rows] == [OPEN, OPEN, OPEN]
    other = dataclasses.replace(known, estimates={"0": found})  # as files once had it
    with pytest.raises(InputError, match="estimate of '0'"):
        page.summary(claim, other)
    other.write(tmp_path)
    monkeypatch.setattr(pictures, "CLAIMS", {"tiny": claim})
    with pytest.raises(InputError):
        pictures.publish(tmp_path, tmp_path / "published", tmp_path, ["tiny"])
    assert not (tmp_path / "published").exists()


@pytest.mark.thorough
def test_a_claim_with_some_of_its_seeds_has_no_verdict(claim, tmp_path, made, monkeypatch):
    real = Study._train

    def fail(self, job):
        if job.folder.name == "seed-1":
            return job, 0.0  # as a run that ended without scores
        return real(self, job)

    monkeypatch.setattr(Study, "_train", fail)
    with pytest.raises(RunStopped):
        running.try_claim(claim, tmp_path, "the command")
    found = results.read(tmp_path / "tiny.json")
    assert set(found.contenders) == {WIDE, THIN, MIXED}  # the others are trained all the same
    assert found.estimates == {}
    monkeypatch.setattr(page, "CLAIMS", {"tiny": claim})
    assert {row[1] for row in page.summary(claim, found).rows} == {"not finished"}
    assert "(1 of 2 seeds)" in "\n".join(page.section(claim, found))


@pytest.mark.thorough
def test_predictions_that_do_not_give_the_score_are_refused(claim, tmp_path, made):
    running.try_claim(claim, tmp_path, "")
    file = tmp_path / "tiny/runs/lora-r-4/seed-0/predictions.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["prediction"] = "no class"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError):
        running.measure(claim, tmp_path, "")
