"""Train one adapter and save it: python train.py +method=mola model=minilm data=wordnet"""

import os
from functools import partial

# Before torch loads OpenMP: threads that spin while they wait slow each other down.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hydra
from omegaconf import DictConfig

from petl.cli import app
from petl.data import read_data
from petl.distributed.engine import on_device, shard
from petl.distributed.launch import read_launch, start
from petl.losses import attach
from petl.models.loading import load_base, load_processor
from petl.reports.run_report import print_summary, write_report
from petl.runs.run_folder import Run
from petl.runs.settings import read_loss, read_settings
from petl.training.dataloader import encode_splits
from petl.training.evaluate import score
from petl.training.linear_probe import frozen_head
from petl.training.loop import fit
from petl.training.lr_finder import find_lr
from petl.training.wrapping import check_model, wrap_arguments, wrap_for_run


@hydra.main(version_base="1.3", config_path="configs", config_name="train")
@app.job
def main(cfg: DictConfig) -> float:
    settings = read_settings(cfg)
    accelerator = start(settings.seed, settings.computes_in(cfg.model.dtype), read_launch(cfg))
    data = read_data(cfg.data)
    run = Run(cfg, settings, accelerator)
    processor = load_processor(cfg.model, data.task)
    splits = encode_splits(data, processor, settings, accelerator)
    method = wrap_arguments(cfg, splits, settings, accelerator)
    base = on_device(load_base(cfg.model, data.task, processor=processor), accelerator)
    model = wrap_for_run(base, method, settings)
    loss = read_loss(cfg)
    if loss is not None:
        attach(model, loss)
    check_model(model, settings)
    run.begin(model)
    shard(model, accelerator)

    test = partial(score, model, splits, accelerator, settings.eval_batch_size)
    run.score("frozen_head", partial(frozen_head, model, splits, settings, accelerator))
    run.score("before", test)
    if settings.find_lr:
        settings = find_lr(model, splits, settings, accelerator, run)
    progress = fit(model, splits, settings, accelerator, run)
    # before saving: what a loss measured of the adapter goes with it
    after = run.measure(test)
    run.save(model, data.task)
    run.finish(model, data.task, progress, after)
    write_report(run)
    print_summary(run)
    return run.objective


if __name__ == "__main__":
    app.entry(main)
