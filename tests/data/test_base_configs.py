from dataclasses import fields
from pathlib import Path
from pkgutil import resolve_name

import pytest
from omegaconf import OmegaConf

from petl.data import SOURCES
from petl.system.values import read_fields

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
# what the reader has to say
SETS = {"first": "wordnet", "second": {"data": "wordnet", "train_rows": 100}}
REQUIRED = {"name": "someone/something", "train": "rows.csv", "sets": SETS}


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_every_data_config_lists_the_settings_of_its_source(path):
    cfg = OmegaConf.to_container(OmegaConf.load(path))
    source = resolve_name(SOURCES[cfg["source"]])
    assert set(cfg) == {field.name for field in fields(source)}
    for key, value in cfg.items():
        if value is None and key in REQUIRED:
            cfg[key] = REQUIRED[key]
    built = read_fields(source, cfg, "data")
    cfg.pop("sets", None)  # it has all settings of each set by now
    assert {key: getattr(built, key) for key in cfg} == cfg
