"""The folder of YAML configurations, and the values that a method's file has."""

from pathlib import Path
from typing import Any

import yaml


def config_dir() -> Path:
    """Return the folder of configurations: next to the package in a checkout, else inside it."""
    package = Path(__file__).parents[1]
    return next(d for d in (package / "configs", package.parent / "configs") if d.is_dir())


def method_preset(name: str) -> dict[str, Any]:
    """Return the values in configs/method/NAME.yaml of petl; {} if there is no such file."""
    file = config_dir() / "method" / f"{name}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
