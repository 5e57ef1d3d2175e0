"""Train one adapter and save it: python train.py +method=mola model=minilm data=wordnet"""

import os
from functools import partial

# Set before torch loads OpenMP: threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from omegaconf import DictConfig

from petl.cli import app
from petl.distributed.engine import on_device, shard
from petl.distributed.launch import start
from petl.losses import attach
from petl.models.loading import load_base, load_processor
from petl.reports.run_report import print_summary, write_report
from petl.runs.run_config import read_config
from petl.runs.run_folder import Run
from petl.training.dataloader import encode_splits
from petl.training.evaluate import score
from petl.training.linear_probe import linear_probe
from petl.training.loop import fit
from petl.training.lr_finder import find_lr
from petl.training.wrapping import check_model, wrap_arguments, wrap_for_run


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@app.job
def main(cfg: DictConfig) -> float:
    config = read_config(cfg)
    settings = config.train
    accelerator = start(settings.seed, config.precision, config.launch)
    run = Run(config, accelerator)
    data = config.data.read()
    processor = load_processor(config.model, data.task)
    splits = encode_splits(data, processor, settings, accelerator)
    arguments = wrap_arguments(config, splits, accelerator)
    base = on_device(load_base(config.model, data.task, processor=processor), accelerator)
    model = wrap_for_run(base, arguments, settings)
    if config.loss is not None:
        attach(model, config.loss)
    check_model(model, settings)
    run.begin(model)
    shard(model, accelerator)

    test = partial(score, model, splits, accelerator, settings.eval_batch_size)
    probe = partial(linear_probe, model, splits, settings, accelerator)
    run.score("linear_probe", probe, "linear probe")
    run.score("before", test)
    if settings.find_lr:
        settings = find_lr(model, splits, settings, accelerator, run)
    state = fit(model, splits, settings, accelerator, run)
    after = run.measure(test)  # before saving: it may compute what a loss saves with the adapter
    run.save(model, data.task)
    run.finish(model, data.task, settings, state, after)
    write_report(run)
    print_summary(run)
    return run.scores.objective


if __name__ == "__main__":
    app.entry(main)
