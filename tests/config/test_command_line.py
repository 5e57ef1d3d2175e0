"""Templates in settings, which Hydra would read as dictionaries."""

import pytest

from petl.config.command_line import with_quoted_templates
from petl.config.compose import compose


@pytest.mark.parametrize(
    "template",
    ["{question}", "Question: {question}\\n{context}", 'He said "{a}", [{b}]=', "{a}, {b}"],
)
def test_a_template_is_read_as_it_was_typed(template):
    cfg = compose(["data=files", f"data.prompt={template}", "+data.answer={a}"])
    assert (cfg.data.prompt, cfg.data.answer) == (template, "{a}")


@pytest.mark.parametrize(
    "word", ["data.prompt='{a}'", 'data.prompt="{a}","{b}"', "data.prompt=${data.text}", "x={a: 1}"]
)
def test_other_words_are_left_as_they_are(word):
    assert with_quoted_templates([word]) == [word]
