"""The command `petl train-predictors`: which tokens attention looks at, learned by networks."""

from petl.cli.commands import composed
from petl.cli.table import PredictorOptions


def train_predictors(options: PredictorOptions) -> None:
    """Train predictors on the rows of a configuration, and write their file."""
    cfg = composed(options.overrides)
    from petl.data.base import as_dataset, read_data
    from petl.data.models.loading import load_base, load_processor
    from petl.data.refused_rows import encode_usable
    from petl.efficiency.tokens.predictors import train_predictors
    from petl.experiments.reports.formatting import echo
    from petl.system.progress import ProgressItems
    from petl.training.calibration import CalibrationBatches, CalibrationData
    from petl.training.distributed.launch import on_device, start
    from petl.training.runs.settings import read_train

    settings = read_train(cfg)
    accelerator = start(settings.seed, "no")
    data = read_data(cfg.data)
    processor = load_processor(cfg.model, data.task)
    size = options.batch_size
    count = options.steps * size
    _, (rows,) = encode_usable(data, processor, lambda data: [as_dataset(data, count)])
    chosen = CalibrationData(num_samples=count, seq_len=options.length, batch_size=size)
    collate = data.task.collate(processor, 1)  # no padding to multiples
    batches = CalibrationBatches(rows, collate, chosen, data.task.label_columns)
    base = on_device(load_base(cfg.model, data.task, processor=processor), accelerator)
    found = train_predictors(
        base,
        ProgressItems(batches, "training predictors"),
        block=options.block,
        layers=options.layers,
        keep=options.keep,
        lr=options.lr,
    )
    found.predictors.save(options.out)
    echo(
        f"{options.out}: predictors of {len(found.predictors.layers)} layers, which keep "
        f"{100 * found.recall:.0f} % of what attention looks at most (error {found.loss:.2f} of "
        "the mean square)"
    )
