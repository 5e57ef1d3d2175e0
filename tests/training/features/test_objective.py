"""Runs that learn from preferences."""

import json
from random import Random

import pytest
from training_fixtures import CLASSES, FILLERS, assert_same_course, stopped_before, train

from petl.cli.main import main
from petl.experiments.reports.run_report import write_page

pytest_plugins = ["task_fixtures", "training_fixtures"]
SHORT = [
    "data=files", "data.max_length=40", "train.steps=6", "train.batch_size=8", "train.lr=1e-2",
    "train.log_steps=1", "train.save_steps=3", "train.warmup=0",
]  # fmt: skip


def sentence(rng, kind):
    return " ".join([rng.choice(CLASSES[kind]), *rng.choices(FILLERS, k=rng.randint(1, 5))])


@pytest.fixture(scope="module")
def preferences(families, tmp_path_factory):
    """Settings of a run on pairs, whose chosen answers begin with a beast, others with a tool."""
    folder, rng = tmp_path_factory.mktemp("preferences"), Random(0)
    for name, count in (("train", 48), ("test", 12)):
        rows = [
            {
                "prompt": " ".join(rng.choices(FILLERS, k=rng.randint(2, 6))),
                "chosen": sentence(rng, "beast"),
                "rejected": sentence(rng, "tool"),
            }
            for _ in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    files = [f"data.train={folder}/train.jsonl", f"data.test={folder}/test.jsonl"]
    return [*SHORT, "model=path", f"model.path={families.folder}/llama", *files]


@pytest.mark.cells(1)
@pytest.mark.parametrize(
    ("task", "method"),
    [("dpo", "lora"), ("kto", "mola")],
)
def test_a_run_learns_and_resumes_exactly(task, method, preferences, tmp_path):
    words = [*preferences, f"+task={task}", f"+method={method}"]
    run = train(words, tmp_path / "whole")
    before, after = run.scores["before"], run.scores["after"]
    assert after["loss"] < before["loss"]
    assert after["margin"] > before["margin"]
    assert after["accuracy"] > 0.5
    lines = [line for line in run.metrics if "loss" in line]
    assert all("accuracy" in line for line in lines), "of the last micro-batch"
    stopped = stopped_before(run, tmp_path / "stopped", "step-000006")
    resumed = train([*words, "train.resume=auto"], stopped.path)
    assert_same_course(resumed, run, atol=0)
    assert resumed.scores["after"] == after


@pytest.mark.thorough
def test_what_follows_a_run(preferences, tmp_path, capsys):
    run = train([*preferences, "+task=dpo", "+method=increlora"], tmp_path / "run")
    write_page(run.path)
    page = (run.path / "report.html").read_text()
    assert "Direct preference optimization" in page
    assert "log-ratio of an answer to the base model" in page
    assert "Margin" in page
    capsys.readouterr()
    assert main(["eval", str(run.path)]) == 0
    evaluated = json.loads((run.path / "eval-test" / "scores.json").read_text())
    assert evaluated == pytest.approx(run.scores["after"], abs=1e-6)
    assert main(["generate", str(run.path), "--prompt", "the cat", "--max-new-tokens", "2"]) == 0
    assert main(["merge", str(run.path), str(tmp_path / "merged")]) == 0
    assert main(["data", *preferences[:1], *preferences[-4:], "+task=dpo"]) == 0
    assert "tokens with loss" in capsys.readouterr().out


@pytest.mark.thorough
def test_odds_without_a_reference(preferences, tmp_path):
    scores = train([*preferences, "+task=orpo", "+method=corda"], tmp_path / "run").scores
    assert scores["after"]["loss"] < scores["before"]["loss"]


@pytest.mark.thorough
def test_a_reward_model_rates_answers(preferences, tmp_path):
    run = train([*preferences, "+task=reward", "+method=mola"], tmp_path / "run")
    assert run.scores["after"]["accuracy"] > run.scores["before"]["accuracy"]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    rows = [{"prompt": "the old", "completion": text} for text in ("cat a big", "saw a big")]
    file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert main(["predict", str(run.path), str(file), "--out", str(out)]) == 0
    beast, tool = (json.loads(line)["prediction"] for line in out.read_text().splitlines())
    assert beast > tool


@pytest.mark.thorough
def test_sampled_answers_are_learned_from_and_resumed(preferences, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "def cats(completions, **_):\n"
        "    return [c[0]['content'].split().count('cat') for c in completions]"
    )
    sampling = ["task.generations=4", "task.max_new_tokens=3", f"task.reward={file}:cats"]
    words = [*preferences, "+task=grpo", "+method=mola", "train.lr=2e-2", *sampling]
    run = train(words, tmp_path / "whole")
    assert run.scores["after"]["reward"] > run.scores["before"]["reward"]
    assert all(0 < line["length"] <= 3 for line in run.metrics)
    line = (run.path / "predictions.jsonl").read_text().splitlines()[0]
    assert {"prediction", "reward", "given"} <= json.loads(line).keys()
    stopped = stopped_before(run, tmp_path / "stopped", "step-000006")
    resumed = train([*words, "train.resume=auto"], stopped.path)
    assert_same_course(resumed, run, atol=0)
    assert [each["reward"] for each in resumed.metrics] == [each["reward"] for each in run.metrics]
