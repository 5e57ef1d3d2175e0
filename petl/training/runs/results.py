"""What a finished run leaves: the adapter with its card, pictures and scores."""

from dataclasses import asdict

from petl.core.lifecycle import lifecycle
from petl.core.model.coverage import coverage_of
from petl.core.parameters import adapter_parameters
from petl.core.spec.facts import facts_of, modifies_base_weights
from petl.core.types import Record, base_of
from petl.data.models.loading import save_processor
from petl.data.models.sources import RandomInit
from petl.data.tasks.base import write_labels, write_task
from petl.system.collectives import on_main
from petl.system.files.disk import atomic_folder, flush, stop_when_full, write_atomic
from petl.training.distributed.launch import gathered
from petl.training.features import Context
from petl.training.runs.card_code import BASE
from petl.training.runs.checkpoint import TrainState, save_adapter
from petl.training.runs.config import names_of
from petl.training.runs.environment import peak_memory
from petl.training.runs.model_card import README, CardInfo, known_base, model_card
from petl.training.runs.records import ADAPTER
from petl.training.runs.run_folder import START


def save(context: Context) -> None:
    """Write the trained adapter, labels, processor and the method's plots."""
    # all processes: parameters may be sharded, and each has a part
    with gathered(context.model):
        on_main(context.accelerator, lambda: _save(context))


def _save(context: Context) -> None:
    run, model, task = context.run, context.model, context.splits.task
    with stop_when_full(run.path):
        flush(run.path)  # `atomic_folder` would make a deleted folder again, with nothing else
    start = run.path / START if modifies_base_weights(model.active_peft_config) else None
    with atomic_folder(run.path / ADAPTER) as folder:
        save_adapter(model, folder, start=start)
        write_labels(folder, task.model_kwargs())
        write_task(folder, task)
        save_processor(run.config.model, task, folder)
        if isinstance(run.config.model, RandomInit):  # no hub or folder has its config
            base_of(model).config.save_pretrained(folder / BASE)
    # after the adapter: a plot that fails must not cost the result
    lifecycle(model).plots(run.path)


def finish(context: Context, state: TrainState, after: dict[str, float] | None) -> None:
    """Complete the adapter's README, scores.json and the tracker's run.

    Args:
        state: of the training, at its end.
        after: scores after training; None with `train.test=false`.
    """
    run, model, task, settings = context.run, context.model, context.splits.task, context.settings
    has_no_head = facts_of(model.active_peft_config).replaces_head
    file = run.path / ADAPTER / "adapter_model.safetensors"
    # the file is on the disk of the main process
    size = on_main(run.accelerator, lambda: file.stat().st_size)
    entries: Record = {
        "after": after,  # the presence of this key marks a finished run
        "task": task.name,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "validation": state.best,
        "validation_scores": state.best_scores or None,
        "best_step": state.best_step,
        "steps": state.step,
        "lr": settings.lr,
        # no head trains under a method that takes its place
        "head_lr": None if has_no_head else settings.head_lr,
        "tokens": state.tokens,
        "unit": task.unit,
        "padding": state.padding,
        "seconds": state.seconds,
        "cpu_seconds": state.cpu_seconds,
        "trainable_parameters": model.get_nb_trainable_parameters()[0],
        "adapter_parameters": adapter_parameters(model),
        "adapter_bytes": size,
    }
    coverage = coverage_of(model)
    if coverage is not None:
        entries["coverage"] = {**asdict(coverage), "summary": str(coverage)}
    figures = lifecycle(model).figures()
    if figures:
        entries["method"] = figures
    for feature in context.features:
        entries |= feature.after_training(context, state.step)
    entries["time_split"] = run.timer.totals()  # with that of features
    # before the scores, which mark a finished run
    on_main(run.accelerator, lambda: _write_card(context, entries))
    run.scores.add({**entries, **peak_memory(run.accelerator.device)})
    run.end()
    if run.tracker:
        from petl.training.tracking.tables import send_results  # most runs have none

        # under the name that other trainers have as well
        scores = {**run.scores, "test": after, "objective": run.scores.objective}
        send_results(run.tracker, run.path, scores)


def _write_card(context: Context, entries: Record) -> None:
    run, config = context.run, context.model.active_peft_config
    source = run.config.model
    card = model_card(
        CardInfo(
            context.splits.task,
            source,
            config,
            known_base(source, config.revision),
            run.config.resolved,
            {**run.scores, **entries},
            run.environment,
            run_names=names_of(run.config.resolved),
        )
    )
    with stop_when_full(run.path):
        write_atomic(run.path / ADAPTER / README, card)
