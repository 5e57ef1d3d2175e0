"""Folders that look like those of finished runs, with figures that a test chooses."""

import json
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from petl import app
from petl.fields import plain
from petl.settings import read_settings


def write_run(
    folder: Path,
    accuracy: float,
    *overrides: str,
    before: float = 0.1,
    started: str = "2026-11-25T10:00:00+00:00",
    **figures: Any,
) -> Path:
    """A finished run on the default task with this accuracy; `figures` go into scores.json."""
    folder.mkdir(parents=True)
    cfg = app.compose(overrides)
    settings: Any = plain(cfg)
    settings["train"]["lr"] = read_settings(cfg).lr  # as a run notes it
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    scores = {
        "before": {"accuracy": before, "rows": 100.0},
        "frozen_head": None,
        "after": {"accuracy": accuracy, "rows": 100.0},
        "metric": "accuracy",
        "higher_is_better": True,
        "validation": None,
        "steps": 10,
        "seconds": 5.0,
        "cpu_seconds": 4.0,
        "adapter_parameters": 1000,
        "adapter_bytes": 4096,
        "peak_rss_bytes": 2 * 10**6,
    }
    (folder / "scores.json").write_text(json.dumps(scores | figures))
    environment = {
        "command": "python train.py",
        "started": started,
        "device": "cpu",
        "processor": "a processor",
        "cores": 2,
        "threads": 1,
        "git": "0" * 40,
        "packages": {"petl": "0", "torch": "1", "transformers": "2", "peft": "3"},
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder
