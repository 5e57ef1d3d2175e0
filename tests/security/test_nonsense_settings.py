"""Any settings are accepted, or refused in a message of a few lines, before any work.

`pytest --hypothesis-profile long tests/security/test_nonsense_settings.py` searches for longer.
"""

import dataclasses
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nonsense import answered, values
from training_fixtures import ROOT, tiny  # noqa: F401

from petl.core.registry import METHODS, list_methods
from petl.core.support import Capability
from petl.experiments.planning.plan import plan_run
from petl.system.settings.schema import flat, plain
from petl.training.compose import compose, groups
from petl.training.runs.run_config import read_config

SECONDS = 60  # of processor time for one example; it takes less than one
GROUPS = sorted(groups() - {"search"})
NAMES = sorted(file.stem for file in (ROOT / "configs").glob("*/*.yaml"))
# what they set is another test's (modules) or another program's (Hydra's own)
LEFT_OUT = ("imports", "hydra")
KNOWN = [key for key in flat(plain(compose(["+method=lora"]))) if not key.startswith(LEFT_OUT)]
OTHERS = ["method", "model", "data", "train", "tracker", "loss.eps", "launch.stage", "method.r"]
keys = st.one_of(st.sampled_from([*KNOWN, *OTHERS]), st.text("abc.@_~+7", max_size=8))
words = st.builds("{}{}={}".format, st.sampled_from(["", "+", "++", "++"]), keys, values)
choices = st.builds("{}={}".format, st.sampled_from(["+method", *GROUPS]), st.sampled_from(NAMES))


@st.composite
def runs(draw):
    """A method, and settings of a run or of that method."""
    name = draw(st.sampled_from(list_methods()))
    fields = [f"method.{f.name}" for f in dataclasses.fields(METHODS[name].config_cls)]
    setting = st.builds("++{}={}".format, st.sampled_from(KNOWN) | st.sampled_from(fields), values)
    return [f"+method={name}", *draw(st.lists(setting, min_size=1, max_size=2))]


@given(st.lists(st.one_of(words, choices, st.text(max_size=9)), max_size=4))
def test_any_words_are_composed_and_checked_or_refused(overrides):
    answered(lambda: read_config(compose(overrides)))


@pytest.mark.thorough
@settings(max_examples=settings.default.max_examples // 2)  # each is a plan of a run
@given(runs())
def test_any_settings_of_a_run_are_planned_or_refused(tiny, overrides):  # noqa: F811
    start = time.process_time()
    answered(lambda: plan_run(compose([*tiny.classify, *overrides])))
    assert time.process_time() - start < SECONDS


@pytest.mark.cells(13)
@pytest.mark.parametrize("name", list_methods())
def test_the_settings_that_are_varied_are_accepted_as_they_are(tiny, name):  # noqa: F811
    overrides = [*tiny.classify, f"+method={name}", "train.steps=1000"]  # AdaLoRA needs 150
    if name == "icv":  # its demonstrations are pairs of texts
        overrides += ["method.train=true", "method.pairs=null", "method.scale=plain"]
        overrides += ["method.keep_norm=false"]
    trains = not METHODS[name].lacking(Capability.TRAIN)
    assert answered(lambda: read_config(compose(overrides))) == trains
