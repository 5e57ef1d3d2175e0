"""`petl draft` and `petl export --vllm`: what they print and write, and what they refuse."""

import json
import re

import pytest
from safetensors.torch import load_file

from petl.system.files.disk import remove

pytest_plugins = ["task_runs", "writer_fixtures"]

QUICK = ["draft.answers=4", "draft.tokens=6", "draft.measured=2", "draft.epochs=1"]


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["causal_lm", "chat"])
def test_a_run_gets_a_drafter_from_its_training_examples(task_runs, command, task):
    run = task_runs(task).path
    words = [*QUICK, "draft.prompt_tokens=3", "drafter.kind=parallel", "drafter.draft_vocab=12"]
    status, out, err = command("draft", run, "+drafter=hydra", *words)
    assert status == 0, err
    try:
        assert re.search(r"4 answers of \d+ tokens, loss \d+\.\d{3}", out)
        assert "tokens per pass on other prompts:" in out
        assert f"written: {run}/drafter" in out
        config = json.loads((run / "drafter" / "drafter_config.json").read_text())
        assert config["fields"]["kind"] == "parallel"
        assert config["hashes"]["tokenizer"]
        status, _, err = command("generate", run, "--prompt", "the red", "--stats")
        assert status == 0
        assert "trained for another" not in err
        medusa = run.parent / "medusa"
        status, out, err = command("export", run / "drafter", medusa, "--vllm")
        assert status == 0, err
        assert "--speculative-config" in out
        assert f"petl merge {run} MODEL" in out
        assert load_file(medusa / "model.safetensors")["lm_heads.0.weight"].shape[0] == 12
        status, _, err = command(
            "export", run / "drafter", run.parent / "other", "--vllm", "--tolerance", "1"
        )
        assert (status, "--tolerance 1.0 is for adapters" in err) == (2, True)
        status, _, err = command("export", run, run.parent / "other", "--vllm")
        assert (status, "has no drafter_config.json" in err) == (2, True)
        remove(medusa)
        (run / "drafter" / "notes.txt").write_text("mine")
        status, _, err = command("draft", run, "+drafter=hydra", *words)
        assert (status, "it holds notes.txt" in err) == (2, True)
        assert (run / "drafter" / "notes.txt").read_text() == "mine"
    finally:
        remove(run / "drafter")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no drafter is chosen: add +drafter=hydra"),
        (["drafter=hydra"], "the drafter is added with a plus"),
        (["+drafter=hydra", "drafter.kind=serial"], "kind='serial' is none of"),
        (["+drafter=hydra", "draft.epochs=0"], "draft.epochs=0 is not an integer from 1"),
        (["+drafter=hydra", "train.lr=3"], "no setting train.lr"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(writers, command, words, message):
    status, _, err = command("draft", writers.folder / "lora", *words)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
