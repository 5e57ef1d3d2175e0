"""The settings under `ranks`: defaults equal to the file, values that are refused."""

import pytest
import yaml
from omegaconf import OmegaConf

from petl.errors import InputError
from petl.system.files.paths import config_dir
from petl.training.compose import compose
from petl.training.ranks.settings import RanksConfig
from petl.training.runs.run_config import read_config


def test_the_file_has_the_defaults():
    stored = yaml.safe_load((config_dir() / "ranks" / "cfsp.yaml").read_text())
    assert RanksConfig(**stored) == RanksConfig()
    assert set(stored) == set(RanksConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+method=lora", "ranks.metric=angle"], "ranks.metric='angle' is not one of angular, cos"),
        (["+method=lora", "ranks.least=0"], "ranks.least=0 is not an integer from 1"),
        (["+method=lora", "ranks.power=-1"], "ranks.power=-1.0 is not a number from 0"),
        (["+method=lora", "ranks.budget=bytes"], "ranks.budget='bytes' is not one of sum, params"),
        (["+method=lora", "ranks.num_samples=0"], "ranks.num_samples=0 is not an integer from 1"),
        (["+method=lora", "+ranks.size=3"], "no setting ranks.size"),
        (["+method=mos"], "method 'mos' cannot have ranks by block: its layers share their pools"),
        (["+method=binary", "method.inner=vera"], "method 'binary' cannot have ranks by block"),
        (["+method=adalora"], "method 'adalora' cannot have ranks by block"),
        (["+method=lora", "method.init_lora_weights=eva"], "eva distributes ranks itself"),
    ],
)
def test_wrong_settings_stop_before_anything_is_loaded(words, message):
    with pytest.raises(InputError, match=message):
        read_config(compose(["+ranks=cfsp", *words]))


def test_ranks_set_by_hand_as_well_are_refused():
    cfg = compose(["+ranks=cfsp", "+method=mola"])
    OmegaConf.update(cfg, "method.rank_pattern", {"query": 4})
    with pytest.raises(InputError, match=r"rank_pattern=.'query': 4. is set already"):
        read_config(cfg)


@pytest.mark.parametrize("inner", ["adapter", "mola", "lora"])
def test_binary_passes_ranks_on_to_its_inner_method(inner):
    words = ["+ranks=cfsp", "+method=binary", f"method.inner={inner}"]
    assert read_config(compose(words)).resolved["ranks"]["name"] == "cfsp"
