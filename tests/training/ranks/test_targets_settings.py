"""The settings under `ranks`: defaults equal to the file, values that are refused."""

import pytest
import yaml

from petl.system.files.paths import config_dir
from petl.training.compose import compose
from petl.training.ranks.targets import RanksConfig
from petl.training.runs.run_config import read_config


def test_the_file_has_the_defaults():
    stored = yaml.safe_load((config_dir() / "ranks" / "cfsp.yaml").read_text())
    assert RanksConfig(**stored) == RanksConfig()
    assert set(stored) == set(RanksConfig.__dataclass_fields__)


@pytest.mark.parametrize("inner", ["adapter", "mola", "lora"])
def test_binary_passes_ranks_on_to_its_inner_method(inner):
    words = ["+ranks=cfsp", "+method=binary", f"method.inner={inner}"]
    assert read_config(compose(words)).resolved["ranks"]["name"] == "cfsp"
