"""The start of `petl train` and of train.py: most of what is wrong in its words needs no torch."""

import sys
from collections.abc import Callable, Sequence
from functools import cache, wraps
from inspect import unwrap
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NoReturn

import hydra
from omegaconf import DictConfig

from petl.errors import RunStopped
from petl.system.imports.collector import rare_collections
from petl.system.settings.command_line import CONFIG, config_dir
from petl.training import program as app
from petl.training.runs.early import read_early
from petl.training.runs.settings import require_method

if TYPE_CHECKING:
    from petl.training.loop import Stepwise
    from petl.training.wrapping import Bases


def train_with(cfg: DictConfig, bases: "Bases") -> "Stepwise[float]":
    """Begin a run of a sweep that trains together with others, on the weights that they share."""
    return unwrap(_run())(cfg, bases)


@wraps(train_with, assigned=(), updated=())  # what `inspect.unwrap` gives to such a sweep
def train(cfg: DictConfig) -> float:
    """Train one adapter, as a job of Hydra; return what a search optimizes."""
    with app.reported_to_hydra():
        try:
            require_method(cfg)
            read_early(cfg)
            run = _run()
        except KeyboardInterrupt as error:  # there is nothing to resume yet
            raise RunStopped("interrupted", status=130) from error
    return run(cfg)


@cache
def _run() -> Callable[[DictConfig], float]:
    """Import the run, and with it torch, transformers and PEFT."""
    with rare_collections():
        return resolve_name("petl.cli.train:train")


def main(words: Sequence[str]) -> NoReturn:
    """Run the words after `petl train` as the program, and exit."""
    sys.argv = [sys.argv[0], *words]  # what Hydra reads
    app.entry(
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=CONFIG)(train)
    )
