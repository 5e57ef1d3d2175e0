"""Studies: learning rates are chosen on validation examples, seeds scored on the test set."""

import io
import json
import shutil
import subprocess
import sys

import pytest
import warm_python
from comparable import write_adapter, write_run
from omegaconf import OmegaConf
from training_fixtures import Tiny

import petl
from petl.cli import precision
from petl.cli.main import main as command
from petl.errors import InputError, RunStopped
from petl.experiments.sweeps import forked_runs
from petl.experiments.sweeps.study import Contender, Study, StudyJob, told_apart
from petl.training.compose import compose

pytest_plugins = ["training_fixtures", "claims_fixtures"]


@pytest.fixture
def faked(monkeypatch) -> list[str]:
    """Folders of the runs that were made, which have scores and settings without training."""
    folders = []

    def make(self: Study, job: StudyJob) -> tuple[StudyJob, float]:
        folders.append(str(job.folder.relative_to(self.folder)))
        write_run(job.folder, 0.5, *job.overrides, validation=0.5)
        write_adapter(job.folder)
        job.log.write_text("")
        return job, 0.0

    monkeypatch.setattr(Study, "_train", make)
    return folders


def small(tiny: Tiny, folder, **changes) -> Study:
    given = {
        "contenders": [Contender("lora"), Contender("lora method.r=2")],
        "seeds": [0, 1],
        "rates": [1e-5, 1e-2],
        "overrides": tiny.steady,
        "tuning_seeds": 1,
    }
    return Study(folder=folder, **{**given, **changes})


@pytest.mark.thorough
def test_each_method_is_tuned_and_then_run_with_every_seed(tiny, tmp_path, made):
    found = small(tiny, tmp_path)
    found.run()
    assert made == [
        *("tune/lora/lr-1e-05", "tune/lora/lr-0.01"),
        *("tune/lora-r-2/lr-1e-05", "tune/lora-r-2/lr-0.01"),
        *("runs/lora/seed-0", "runs/lora-r-2/seed-0", "runs/lora/seed-1", "runs/lora-r-2/seed-1"),
    ]
    rates = json.loads((tmp_path / "rates.json").read_text())
    for contender in found.contenders:
        noted = rates[contender.name]
        best = max(noted["validation"], key=lambda rate: noted["validation"][rate])
        assert noted["validation"][f"{noted['taken']:g}"] == noted["validation"][best]
    for name in made:
        scores = json.loads((tmp_path / name / "scores.json").read_text())
        if name.startswith("tune"):  # nothing of the test rows can leak into the choice
            assert scores["after"] is scores["before"] is None
            assert not scores.get("linear_probe")
            assert 0 <= scores["validation"] <= 1
        else:
            assert scores["after"]["rows"] == 20


def test_a_stopped_study_resumes(tiny, tmp_path, faked, monkeypatch):
    real = Study._train

    def stop(self, job):
        if len(faked) == 2:
            raise KeyboardInterrupt
        return real(self, job)

    monkeypatch.setattr(Study, "_train", stop)
    one = {"contenders": [Contender("lora")]}
    with pytest.raises(KeyboardInterrupt):
        small(tiny, tmp_path, **one).run()
    monkeypatch.setattr(Study, "_train", real)
    small(tiny, tmp_path, **one).run()
    assert faked == [
        "tune/lora/lr-1e-05",
        "tune/lora/lr-0.01",
        "runs/lora/seed-0",
        "runs/lora/seed-1",
    ]


def test_a_run_of_a_study_that_lost_its_adapter_is_due_again(tiny, tmp_path, faked):
    one = {"contenders": [Contender("lora")], "rates": []}
    small(tiny, tmp_path, **one).run()
    assert faked == ["runs/lora/seed-0", "runs/lora/seed-1"]
    shutil.rmtree(tmp_path / faked[0] / "adapter")
    with pytest.raises(FileExistsError):  # this stand-in for a training begins in a new folder
        small(tiny, tmp_path, **one).run()
    assert faked == ["runs/lora/seed-0", "runs/lora/seed-1", "runs/lora/seed-0"]


@pytest.mark.thorough
def test_a_study_says_what_it_does_and_how_to_continue(tiny, tmp_path, faked, monkeypatch, capsys):
    real = Study._train

    def stop(self, job):
        if len(faked) == 2:
            raise KeyboardInterrupt
        return real(self, job)

    monkeypatch.setattr(Study, "_train", stop)
    words = ["study", str(tmp_path), "--methods", "lora", "--seeds", "0,1,2", *tiny.steady]
    monkeypatch.setattr("sys.argv", ["petl", *words])
    assert command(words) == 130
    err = capsys.readouterr().err
    assert "[1/3] runs/lora/seed-0: test accuracy" in err
    assert "; 1 left, about " in err
    assert f"petl study {tmp_path} --methods lora --seeds 0,1,2" in err
    monkeypatch.setattr(Study, "_train", real)
    assert command(words) == 0
    assert "already finished: 2 of 3 runs" in capsys.readouterr().err


def test_failed_runs_are_named_and_the_others_trained(tiny, tmp_path, faked, monkeypatch):
    real = Study._train

    def fail(self, job):
        if job.folder.name != "seed-0":
            return real(self, job)
        job.log.parent.mkdir(parents=True)
        job.log.write_text("error: no room\n")
        return job, 0.0

    monkeypatch.setattr(Study, "_train", fail)
    found = small(tiny, tmp_path, contenders=[Contender("lora")], rates=[1e-3])
    with pytest.raises(RunStopped, match=r"seed-0\.log: no room"):
        found.run()
    assert faked == ["runs/lora/seed-1"]


def test_a_method_whose_runs_all_fail_is_named_on_the_page_of_the_others(
    tiny, tmp_path, faked, monkeypatch, capsys
):
    real = Study._train

    def fail(self, job):
        if job.folder.parent.name != "mola":
            return real(self, job)
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a") as log:
            log.write("a step\nerror: <b>mola</b> cannot\na last line\n")
        return job, 0.0

    monkeypatch.setattr(Study, "_train", fail)
    line = ["study", str(tmp_path), "--methods", "mola", "--method", "lora train.lr=1e-3"]
    assert command([*line, "--rates", "1e-3,1e-2", "--seeds", "0", *tiny.steady]) == 1
    assert "lr-0.01.log: <b>mola</b> cannot" in capsys.readouterr().err
    for name in ("index.html", "results.md"):
        assert "&lt;b&gt;mola&lt;/b&gt; cannot" in (tmp_path / name).read_text()
    assert faked == ["runs/lora-train.lr-1e-3/seed-0"]


@pytest.fixture
def trial(tmp_path, monkeypatch):
    """What the trial of this machine finds, as `answer`; a line in `file` for each."""
    file, answer = tmp_path / "trials", tmp_path / "answer"
    code = (
        "import pathlib, sys; file, answer = map(pathlib.Path, sys.argv[1:3]); "
        "file.open('a').write('.'); print(answer.read_text())"
    )
    line = (sys.executable, "-S", "-c", code, str(file), str(answer))
    monkeypatch.setattr("petl.experiments.sweeps.found_precision.COMMAND", line)
    monkeypatch.setattr("petl.experiments.sweeps.found_precision.width_to_try", lambda _: 384)
    answer.write_text("bf16")
    return file, answer


def test_all_runs_of_a_study_have_the_precision_that_auto_was_at_first(
    tiny, tmp_path, faked, trial
):
    file, answer = trial
    work, auto = tmp_path / "study", [*tiny.steady, "train.precision=auto"]
    one = {"contenders": [Contender("lora")], "rates": [], "overrides": auto}
    small(tiny, work, **one, seeds=[0]).run()
    answer.write_text("no")  # as on another machine
    small(tiny, work, **one, seeds=[0, 1]).run()
    assert faked == ["runs/lora/seed-0", "runs/lora/seed-1"]
    found = {OmegaConf.load(work / name / "config.yaml").train.precision for name in faked}
    assert found == {"bf16"}
    assert file.read_text() == "."


def test_a_run_keeps_the_precision_in_which_it_began(tiny, tmp_path, faked, trial):
    auto = [*tiny.steady, "train.precision=auto"]
    one = {"contenders": [Contender("lora")], "rates": [], "overrides": auto}
    begun = small(tiny, tmp_path / "study", **one, seeds=[0])
    job = begun._final(begun.contenders[0], 0, None)
    write_run(job.folder, 0.5, *job.overrides, "train.precision=no")
    (job.folder / "scores.json").unlink()
    begun._check()
    words = begun._in_precision(job).overrides
    assert [w for w in words if w.startswith("train.precision=")] == ["train.precision=no"]


def test_the_precision_of_auto_is_found_as_a_run_finds_it(tiny, monkeypatch, capsys):
    words = [*tiny.steady, "+method=lora", "train.precision=auto"]
    for asked, status in (("bf16", 0), ("no", 0), ("fp8", 2)):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", asked)
        monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(words)))
        monkeypatch.setattr("sys.argv", ["precision"])
        assert precision.main() == status
        assert capsys.readouterr().out.strip() == (asked if status == 0 else "")


@pytest.mark.thorough
def test_without_rates_each_method_has_its_default(tiny, tmp_path, faked):
    found = small(tiny, tmp_path, contenders=[Contender("compacter method.r=4")], rates=[])
    found.run()
    assert faked == ["runs/compacter-r-4/seed-0", "runs/compacter-r-4/seed-1"]
    config = OmegaConf.load(tmp_path / faked[0] / "config.yaml")
    assert config.train.lr == petl.method("compacter").lr


@pytest.mark.thorough
def test_the_seed_of_a_run_can_be_that_of_its_method(tiny, tmp_path, faked):
    words = "sparse method.r=1 method.selection_algorithm=none method.init_seed={seed}"
    found = small(tiny, tmp_path, contenders=[Contender(words)], seeds=[0, 3])
    found.run()
    seeds = {
        name: OmegaConf.load(tmp_path / name / "config.yaml").method.init_seed for name in faked
    }
    folder = "sparse-r-1-selection_algorithm-none-init_seed-seed-"
    assert seeds == {
        **{f"tune/{folder}/lr-{rate:g}": 0 for rate in found.rates},
        **{f"runs/{folder}/seed-{seed}": seed for seed in (0, 3)},
    }


def test_a_method_with_a_rate_of_its_own_keeps_it(tiny, tmp_path, faked):
    contenders = [Contender("lora train.lr=2e-3"), Contender("lora")]
    found = small(tiny, tmp_path, contenders=contenders, seeds=[0])
    found.run()
    kept, chosen = "runs/lora-train.lr-2e-3/seed-0", "runs/lora/seed-0"
    assert faked == ["tune/lora/lr-1e-05", "tune/lora/lr-0.01", kept, chosen]
    rates = [OmegaConf.load(tmp_path / name / "config.yaml").train.lr for name in (kept, chosen)]
    assert rates == [2e-3, found.tried["lora"]["taken"]]
    assert found.tried.keys() == {"lora"}


@pytest.mark.parametrize(
    ("word", "way_out"),
    [("train.seed=4", "--seeds"), ("train.lr=1e-3", "--rates"), ("train.run=x", "folder")],
)
def test_settings_that_the_study_would_replace_are_refused(tiny, tmp_path, faked, word, way_out):
    with pytest.raises(InputError, match=f"{word}.*{way_out}"):
        small(tiny, tmp_path, overrides=[*tiny.steady, word]).run()
    assert faked == []


def test_rates_of_an_earlier_command_are_not_those_of_the_runs(tiny, tmp_path, faked):
    one = {"contenders": [Contender("lora")], "seeds": [0]}
    first = small(tiny, tmp_path, **one)
    first.run()
    assert first.tried["lora"]["taken"] == 1e-5
    second = small(tiny, tmp_path, **one, rates=[1e-3])
    second.run()
    assert OmegaConf.load(tmp_path / "runs/lora/seed-0/config.yaml").train.lr == 1e-3
    assert "lora" not in second.tried


def test_a_study_in_the_folder_of_another_process_is_refused(tiny, tmp_path, capsys):
    """Else the runs that the other one makes would count as failed."""
    work = tmp_path / "study"
    work.mkdir()
    hold = (  # as `claim`, without what importing it takes
        "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); "
        "print('held', flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-S", "-c", hold, str(work / ".lock")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        words = ["study", str(work), "--methods", "lora", "--seeds", "0", *tiny.steady]
        assert command(words) == 2
        other.communicate()
    assert f"{work} is being written by another process" in capsys.readouterr().err
    assert [file.name for file in work.iterdir()] == [".lock"]


def test_bad_settings_stop_a_study_before_any_run(tiny, tmp_path, made):
    for words, message in (
        ("mloa", "'mloa'"),
        ("lora method.rank=2", "method.rank"),
        ("lora", "lora is .* 2 times"),
    ):
        with pytest.raises(InputError, match=message):
            small(tiny, tmp_path, contenders=[Contender("lora"), Contender(words)]).run()
    assert made == []


def test_of_equal_learning_rates_the_one_with_the_lower_loss_is_chosen(tmp_path):
    found = Study(tmp_path, [Contender("lora")], [0], [1e-4, 1e-3, 1e-2], tuning_seeds=1)
    for rate, loss in zip(found.rates, (0.5, 0.4, 0.4), strict=True):
        folder = found._tuning(found.contenders[0], rate).folder
        scores = {"accuracy": 0.5, "loss": loss}
        figures = {"after": None, "validation": 0.5, "validation_scores": scores}
        write_run(folder, 0.5, "+method=lora", **figures)
    assert found.best_rate(found.contenders[0]) == 1e-3  # of equal losses the lower rate


RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1]


@pytest.fixture
def scored(monkeypatch) -> dict[float, float | None]:
    """Validation scores by learning rate, which runs get without training; None: they fail."""
    table: dict[float, float | None] = {}

    def score(self: Study, job: StudyJob) -> tuple[StudyJob, float]:
        given = dict(word.split("=", 1) for word in job.overrides)
        rate = float(given["train.lr"])
        if table[rate] is not None:
            write_run(job.folder, table[rate], *job.overrides, validation=table[rate], lr=rate)
            write_adapter(job.folder)
        return job, 0.0

    monkeypatch.setattr(Study, "_train", score)
    return table


@pytest.mark.cells(2)
@pytest.mark.parametrize(
    ("scores", "tried", "taken"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.3, 0.2, 0.1], RATES[2:5], 3e-3),  # interior at once
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.2, 0.1], RATES[2:6], 1e-2),  # it falls beyond
        ([0.1, 0.2, 0.3, 0.4, 0.5, None, 0.9], RATES[2:6], 1e-2),  # it fails beyond
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7], RATES[2:], 1e-1),  # at the end of all
        ([0.2, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1], RATES[:5], 3e-4),
    ],
)
def test_rates_are_tried_outward_while_the_best_is_at_an_end(
    tiny, tmp_path, scored, scores, tried, taken
):
    scored.update(zip(RATES, scores, strict=True))
    one = {"contenders": [Contender("lora")], "rates": RATES, "seeds": [0]}
    small(tiny, tmp_path, **one, outward=True).run()
    found = json.loads((tmp_path / "rates.json").read_text())["lora"]
    finished = {f"{rate:g}" for rate in tried if scored[rate] is not None}
    assert found["validation"].keys() == finished
    assert found["taken"] == taken
    assert json.loads((tmp_path / "runs/lora/seed-0/scores.json").read_text())["lr"] == taken


def test_a_rate_below_one_that_failed_is_not_at_the_edge(tiny, tmp_path, scored, caplog):
    scored.update({1e-4: 0.3, 1e-3: 0.4, 1e-2: None})
    rates = [1e-4, 1e-3, 1e-2]
    found = small(tiny, tmp_path, contenders=[Contender("lora")], rates=rates, seeds=[0])
    found.run()
    noted = found.tried["lora"]
    assert (noted["taken"], noted["edge"], noted["failed"]) == (1e-3, "", ["0.01"])
    assert "one beyond it" not in caplog.text


def test_a_rate_whose_further_seeds_failed_is_said_to_be_left_out(
    tiny, tmp_path, scored, monkeypatch, caplog
):
    scored.update({1e-4: 0.3, 1e-3: 0.9})
    score = Study._train

    def fail(self, job):
        return (job, 0.0) if job.folder.name == "lr-0.001-seed-1" else score(self, job)

    monkeypatch.setattr(Study, "_train", fail)
    one = {"contenders": [Contender("lora")], "rates": [1e-4, 1e-3], "seeds": [0]}
    found = small(tiny, tmp_path, **one, tuning_seeds=2)
    found.run()
    assert found.tried["lora"]["taken"] == 1e-4
    assert found.tried["lora"]["seeds"] == {"0.0001": 2, "0.001": 1}
    assert "lr=0.001 is left out of the choice: 1 of 2 seeds" in caplog.text


SEEDS = [  # validation scores of three seeds at 1e-4, 1e-3, 1e-2, and the rate that is taken
    ([[0.1], [0.523, 0.519, 0.521], [0.522, 0.523, 0.520]], 1e-3),  # 1e-2 is not told apart
    ([[0.1], [0.50, 0.51, 0.52], [0.54, 0.55, 0.56]], 1e-2),
    ([[0.1], [0.53, 0.40, 0.40], [0.52, 0.55, 0.56]], 1e-2),  # one seed had chosen 1e-3
    ([[0.54, 0.2, 0.2], [0.53, 0.53, 0.53], [0.1]], 1e-3),
]


@pytest.mark.cells(1)
@pytest.mark.parametrize(("scores", "taken"), SEEDS)
def test_a_rate_is_chosen_by_three_seeds_and_the_lower_of_equals(
    tiny, tmp_path, monkeypatch, caplog, scores, taken
):
    """Further seeds score the best rate of the first one and its neighbours."""
    rates, tuned = [1e-4, 1e-3, 1e-2], []

    def score(self: Study, job: StudyJob) -> tuple[StudyJob, float]:
        given = dict(word.split("=", 1) for word in job.overrides)
        rate, seed = float(given["train.lr"]), int(given["train.seed"])
        row = scores[rates.index(rate)]
        value = row[min(seed, len(row) - 1)]
        if job.folder.parent.parent.name == "tune":
            tuned.append((rate, seed))
        write_run(job.folder, value, *job.overrides, validation=value, lr=rate)
        write_adapter(job.folder)
        return job, 0.0

    monkeypatch.setattr(Study, "_train", score)
    one = {"contenders": [Contender("lora")], "rates": rates, "seeds": [0], "tuning_seeds": 3}
    small(tiny, tmp_path, **one).run()
    noted = json.loads((tmp_path / "rates.json").read_text())["lora"]
    assert noted["taken"] == taken
    first = [row[0] for row in scores]
    place = first.index(max(first))
    nearest = rates[max(place - 1, 0) : place + 2]
    assert tuned == [(r, 0) for r in rates] + [(r, s) for s in (1, 2) for r in nearest]
    at_the_end = taken == rates[-1]
    assert (noted["edge"] == "highest") == at_the_end
    assert ("the highest of the learning rates that were tried" in caplog.text) == at_the_end
    before = len(tuned)
    small(tiny, tmp_path, **one).run()  # the same command trains nothing
    assert len(tuned) == before


@pytest.mark.parametrize(("gains", "expected"), [((0, 1, 4), True), ((-1, 0, 3), False)])
def test_rates_are_told_apart_by_one_standard_error_of_the_mean(gains, expected):
    """The deviation of both is 2.1 and the error 1.2; the means are 1.7 and 0.7."""
    best = {seed: (0.5 + gain, 0.0) for seed, gain in enumerate(gains)}
    assert told_apart(best, dict.fromkeys(best, (0.5, 0.0))) is expected


@pytest.mark.thorough
def test_a_rate_that_was_tried_before_counts_and_runs_with_another_one_are_replaced(
    tiny, tmp_path, scored
):
    scored.update(zip(RATES, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.2], strict=True))
    one = {"contenders": [Contender("lora")], "seeds": [0, 1]}
    small(tiny, tmp_path, **one, rates=RATES[1:5]).run()
    folder = tmp_path / "runs/lora"
    assert json.loads((folder / "seed-1/scores.json").read_text())["lr"] == 1e-2
    small(tiny, tmp_path, **one, rates=RATES, outward=True).run()
    found = json.loads((tmp_path / "rates.json").read_text())["lora"]
    assert found["validation"].keys() == {f"{rate:g}" for rate in RATES[1:]}
    for seed in (0, 1):
        assert json.loads((folder / f"seed-{seed}/scores.json").read_text())["lr"] == 3e-2
        before = tmp_path / f"replaced/lora/seed-{seed}-lr-0.01/scores.json"
        assert json.loads(before.read_text())["lr"] == 1e-2


def test_a_folder_of_another_study_is_refused(tiny, tmp_path, faked):
    one = {"contenders": [Contender("lora")], "rates": [1e-3], "seeds": [0]}
    small(tiny, tmp_path, **one).run()
    other = small(tiny, tmp_path, **one, overrides=[*tiny.steady, "train.batch_size=4"])
    with pytest.raises(InputError, match=r"train\.batch_size=8 there, 4 here"):
        other.run()


@pytest.mark.thorough
def test_a_study_of_several_data_sets_resumes(tiny, tmp_path, made):
    rows = f"train:{tiny.folder}/train.csv,test:{tiny.folder}/test.csv,max_length:16"
    sets = f"data.sets={{one:{{data:files,{rows}}},two:{{data:files,{rows}}}}}"
    words = [*tiny.steady[:2], "data=tasks", sets, "train.steps=2", "train.linear_probe=false"]
    several = {"contenders": [Contender("lora")], "rates": [1e-3], "overrides": words}
    small(tiny, tmp_path, **several, seeds=[0]).run()
    small(tiny, tmp_path, **several, seeds=[0, 1]).run()
    assert made == ["runs/lora/seed-0", "runs/lora/seed-1"]


@pytest.mark.thorough
def test_each_run_of_a_study_is_a_process_of_petl_train(tiny, tmp_path, monkeypatch):
    job = StudyJob(tmp_path / "it's here" / "run", [])
    found = Study(tmp_path, [Contender("lora")], [0], [1e-3])
    quoted = found._job(job.folder, Contender("lora"), 0, []).overrides
    assert compose(quoted).train.run == str(job.folder)
    monkeypatch.setattr(forked_runs, "FORKING", (warm_python.python(), *forked_runs.FORKING[1:]))
    found._train(StudyJob(job.folder, ["+method=mloa"]))
    assert "no method 'mloa'" in job.log.read_text()
    # systems without fork
    monkeypatch.setattr(forked_runs, "FORKS", False)
    monkeypatch.setattr(forked_runs, "TRAIN", (warm_python.python(), *forked_runs.TRAIN[1:]))
    found._train(StudyJob(job.folder, ["+method=mlao"]))
    assert "no method 'mlao'" in job.log.read_text()
