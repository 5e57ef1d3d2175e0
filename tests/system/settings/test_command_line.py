"""Commands as they were started, and templates in settings, which Hydra would read otherwise."""

import shlex
import sys

import pytest

from petl.system.settings.command_line import command, in_shell, with_quoted_texts
from petl.training.compose import compose


@pytest.mark.parametrize(
    ("started_as", "processes", "printed"),
    [
        ("train.py", 1, "python train.py +method=lora"),
        ("/a/train.py", 2, "torchrun --nproc_per_node 2 /a/train.py +method=lora"),
        ("/env/bin/petl", 1, "petl train +method=lora"),
        ("/env/lib/petl/__main__.py", 1, "python -m petl train +method=lora"),
        ("/env/lib/petl/__main__.py", 2, "torchrun --nproc_per_node 2 -m petl train +method=lora"),
        # a worker that a launcher of Hydra started
        ("/env/lib/submitit/core/_submit.py", 1, "petl train +method=lora"),
    ],
)
def test_a_command_names_the_program_that_was_started(monkeypatch, started_as, processes, printed):
    monkeypatch.setattr(sys, "argv", [started_as])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert in_shell(["+method=lora"]) == printed


@pytest.mark.parametrize(
    "template",
    ["{question}", "Question: {question}\\n{context}", 'He said "{a}", [{b}]=', "{a}, {b}"],
)
def test_a_template_is_read_as_it_was_typed(template):
    cfg = compose(["data=files", f"data.prompt={template}", "+data.answer={a}"])
    assert (cfg.data.prompt, cfg.data.answer) == (template, "{a}")


@pytest.mark.parametrize("prefix", ["the ", "query: ", " a, b ", 'say "it" '])
def test_a_prefix_keeps_its_last_space(prefix):
    cfg = compose(["data=wordnet_retrieval", f"data.query_prefix={prefix}"])
    assert cfg.data.query_prefix == prefix


@pytest.mark.parametrize(
    "word", ["data.prompt='{a}'", 'data.prompt="{a}","{b}"', "data.prompt=${data.text}", "x={a: 1}"]
)
def test_other_words_are_left_as_they_are(word):
    assert with_quoted_texts([word]) == [word]


@pytest.mark.parametrize(
    "folder",
    [
        "runs/one",
        "läufe/日本",
        "my runs (2)",
        "~/runs",
        "a=b,c",
        "l'été\\'s",
        "[x]#1",
        "${HOME}/1",
        "7",
    ],
)
def test_the_command_that_resumes_names_the_checkpoint_whatever_its_path(monkeypatch, folder):
    monkeypatch.setattr(sys, "argv", ["petl", "+method=lora", "train.resume=other"])
    *_, word = shlex.split(command(resume=folder))
    assert str(compose([word]).train.resume) == folder


@pytest.mark.parametrize("pattern", [r"answer: (\d+)", "a", "^[ab]{2}$"])
def test_a_pattern_needs_no_quotes(pattern):
    words = ["+task=grpo", "task.reward=regex", f"task.pattern={pattern}"]
    assert compose(words).task.pattern == pattern
