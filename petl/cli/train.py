"""The run of `petl train` and of train.py: train one adapter, score it and save it."""

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NoReturn

import hydra
from omegaconf import DictConfig
from peft import PeftModel

from petl.core.losses import attach
from petl.core.registry import is_computed
from petl.data.models.loading import load_base, load_processor
from petl.efficiency.rewrite import apply_rewrites, rewrites_of
from petl.errors import InputError
from petl.experiments.reports.run_report import print_summary, write_report
from petl.system.processes import current_lane
from petl.system.settings.command_line import CONFIG, config_dir
from petl.training import program as app
from petl.training.dataloader import Splits, encode_splits
from petl.training.distributed.launch import on_device, shard, start
from petl.training.evaluate import score
from petl.training.frozen import cached_blocks, report
from petl.training.linear_probe import Untrained, linear_probe
from petl.training.loop import fit
from petl.training.lr_finder import find_lr
from petl.training.ranks.run import ranks_by_importance
from petl.training.runs.records import PREDICTIONS
from petl.training.runs.run_config import RunConfig, read_config
from petl.training.runs.run_folder import Run
from petl.training.together.lanes import share_base
from petl.training.wrapping import (
    check_model,
    load_start,
    wrap_arguments,
    wrap_for_run,
)

logger = logging.getLogger(__name__)


@app.job
def train(cfg: DictConfig) -> float:
    """Train one adapter; return the score that a search optimizes."""
    config = checked(cfg)
    accelerator = start(config.train.seed, config.precision, config.launch)
    run = Run(config, accelerator)
    # a run that is resumed keeps its defaults, and its precision
    settings, accelerator = run.config.train, run.accelerator
    data = config.data.read()
    processor = load_processor(config.model, data.task)
    splits = encode_splits(data, processor, settings, accelerator, config.data.repeats)
    model = wrapped(run, splits, processor)
    run.begin(model)
    with run.tracked():
        shard(model, accelerator)
        frozen = cached_blocks(model, splits, settings, accelerator)
        test = partial(score, model, splits, accelerator, settings.eval_batch_size)
        before_training(run, model, splits, test)
        if settings.find_lr:
            # the same settings, with the learning rate that was found
            settings = find_lr(model, splits, settings, accelerator, run)
        state = fit(model, splits, settings, accelerator, run)
        # before saving: it may compute what a loss saves with the adapter
        after = run.measure(partial(test, when="after training", kept=run.path / PREDICTIONS))
        report(frozen)
        run.save(model, data.task)
        run.finish(model, data.task, settings, state, after)
    write_report(run)
    print_summary(run)
    return run.scores.objective


def checked(cfg: DictConfig) -> RunConfig:
    """Return the checked settings of a run.

    Raises:
        InputError: a setting is wrong, or is one of a sweep.
    """
    config = read_config(cfg)
    if config.train.together > 1 and current_lane() is None:
        raise InputError(
            f"train.together={config.train.together}, and this command makes one run; it is for "
            "sweeps (petl train -m); runs of a study train together by petl study --together"
        )
    return config


def before_training(run: Run, model: PeftModel, splits: Splits, test: Callable[..., Any]) -> None:
    """Score the head alone and the model; then set the strength of a computed adapter."""
    settings, untrained = run.config.train, Untrained()
    probe = partial(linear_probe, model, splits, settings, run.accelerator, untrained)
    run.score("linear_probe", probe, "linear probe")
    config: Any = model.active_peft_config
    # without an adapter that calibration has made
    with model.disable_adapter() if is_computed(config) else nullcontext():
        before = partial(test, when="before training", known=untrained.scores_of)
        run.score_before(before, splits.task)
    if getattr(config, "of_demonstrations", False):
        from petl.methods.icv.run import set_strength

        set_strength(model, splits, settings, run.accelerator, run)


def wrapped(run: Run, splits: Splits, processor: Any) -> PeftModel:
    """Return the run's base model with its adapter, started and checked, on the accelerator."""
    config, accelerator, task = run.config, run.accelerator, splits.task
    settings = config.train
    arguments = wrap_arguments(config, splits, accelerator)
    base = on_device(load_base(config.model, task, processor=processor), accelerator)
    if config.ranks is not None:
        arguments |= ranks_by_importance(run, base, arguments, splits)
    own = [*base.parameters()]
    model = wrap_for_run(base, arguments)
    if current_lane() is not None:
        share_base(model.get_base_model(), own)
    if run.resume is None:  # a checkpoint brings its own weights
        load_start(model, task, settings)
    if config.loss is not None:
        attach(model, config.loss)
    check_model(model, settings)
    names = [f"train.{name}" for name in apply_rewrites(model, rewrites_of(settings))]
    if names:
        logger.info("in less time or memory, with the same result: %s", ", ".join(names))
    return model


def main(words: Sequence[str]) -> NoReturn:
    """Run the words after `petl train` as the program, and exit."""
    sys.argv = [sys.argv[0], *words]  # what Hydra reads
    app.entry(
        # called here, since as a decorator it would hide `train`, which takes a configuration
        hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=CONFIG)(train)
    )
