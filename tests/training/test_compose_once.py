"""What the tests' fixture composes is what Hydra composes."""

import composed_once
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from petl.errors import InputError
from petl.system.files.paths import config_dir
from petl.training.compose import HYDRAS
from petl.training.compose import compose as petl_compose

WORDS = [
    [],
    ["+method=mola"],
    ["+method=mola", "method.r=3", "train.steps=4"],
    ["train.lr=1e-3", "+method=deft", "model=path", "model.path=/some/where", "train.lr=2e-3"],
    ["data=files", "data.train=a.csv", "train.betas=[0.5,0.9]", "train.run='a b=c'"],
    [
        "+method=lora",
        "train.lr=${train.head_lr}",
        "method.target_modules=[q,v]",
        "train.steps=null",
    ],
    ["+method=lora", "+method.new=1", "++train.steps=7", "~method.r", "tracker=wandb"],
    ["+method=lora", "+loss=density", "loss.weight=0.5"],
    ["hydra.job.name=x", "train.steps=2"],
]
WRONG = [
    ["method.r=3"],
    ["+method=mola", "method.none=3"],
    ["train.steps=1,2"],
    ["train.steps=[1"],
    ["+method=none", "train.steps=1"],
    ["data.train.rows.more=1"],
]


def hydra(words: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose("train", words)


@pytest.fixture
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(composed_once, "KEPT", {})


@pytest.mark.cells(3)
@pytest.mark.usefixtures("nothing_kept")
@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_a_composition_equals_that_of_hydra_at_first_and_later(words):
    expected = hydra(words)
    for _ in range(2):
        found = petl_compose(words)
        assert OmegaConf.to_yaml(found) == OmegaConf.to_yaml(expected)
        assert found == expected
        assert OmegaConf.is_struct(found) == OmegaConf.is_struct(expected)
        OmegaConf.update(found, "train.steps", 99)  # of a copy


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_hydra_refuses_is_refused_with_its_error(words):
    with pytest.raises(HYDRAS) as expected:
        hydra(words)
    with pytest.raises(InputError) as found:
        petl_compose(words)
    assert type(found.value.__cause__) is type(expected.value)
    assert str(found.value.__cause__) == str(expected.value)


def test_values_of_one_choice_of_groups_share_what_is_kept(nothing_kept):
    for steps in range(1, 4):
        assert petl_compose(["+method=mola", f"train.steps={steps}"]).train.steps == steps
    assert len(composed_once.KEPT) == 1
