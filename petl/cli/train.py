"""The run of `petl train` and of train.py: train one adapter, score it and save it."""

import logging

from omegaconf import DictConfig

from petl.data.base import read_from
from petl.data.models.loading import load_base, load_processor
from petl.errors import InputError
from petl.experiments.reports.run_report import print_summary, write_report
from petl.training import program as app
from petl.training.dataloader import encode_splits
from petl.training.distributed.launch import shard, start
from petl.training.features import Context, Setup, features_of, orders_of
from petl.training.loop import Stepwise, fit
from petl.training.runs.config import RunConfig
from petl.training.runs.records import PREDICTIONS
from petl.training.runs.results import finish, save
from petl.training.runs.run_config import read_config
from petl.training.runs.run_folder import Run
from petl.training.wrapping import Bases, wrapped

logger = logging.getLogger(__name__)


@app.job
def train(cfg: DictConfig, bases: Bases | None = None) -> Stepwise[float]:
    """Train one adapter, on weights that runs share (`bases`); return what a search optimizes."""
    run = yield from trained(cfg, bases)
    write_report(run)
    print_summary(run)
    return run.scores.objective


def trained(cfg: DictConfig, bases: Bases | None = None) -> Stepwise[Run]:
    """Train one adapter as `train` does, without its page; return the finished run."""
    config = checked(cfg, alone=bases is None)
    accelerator = start(config.train.seed, config.precision, config.launch)
    run = Run(config, accelerator)
    yield run
    # a run that is resumed keeps its defaults, and its precision
    settings, accelerator = run.config.train, run.accelerator
    features = features_of(run.config.resolved)
    data = read_from(run.config.data)
    processor = load_processor(run.config.model, data.task)
    splits = encode_splits(data, processor, settings, accelerator, orders_of(features))
    model = wrapped(Setup(load_base, run.config, splits, features, accelerator, run), bases)
    context = Context(run, splits, model, features, settings)
    run.begin(model)
    with run.tracked():
        shard(model, accelerator)
        before_training(context)
        state = yield from fit(context)
        splits.task.settle(state.best_scores)
        # before saving: it may compute what a loss saves with the adapter
        after = context.test("after training", run.path / PREDICTIONS)
        save(context)
        finish(context, state, after)
    return run


def trial(cfg: DictConfig, bases: Bases | None = None) -> Stepwise[float]:
    """Train one of many adapters, of which nobody reads a page; return what a search optimizes."""
    run = yield from trained(cfg, bases)
    return run.scores.objective


def checked(cfg: DictConfig, *, alone: bool) -> RunConfig:
    """Return the checked settings of a run, which trains alone or with others.

    Raises:
        InputError: a setting is wrong, or is one of a sweep.
    """
    config = read_config(cfg)
    if config.train.together > 1 and alone:
        raise InputError(
            f"train.together={config.train.together}, and this command makes one run; it is for "
            "sweeps (petl train -m); runs of a study train together by petl study --together"
        )
    return config


def before_training(context: Context) -> None:
    """Let the features of a run measure and prepare the model, in their order."""
    for feature in context.features:
        context.run.timer.start()
        feature.before_training(context)
