"""Merge a saved adapter into its base model, and write the result as a plain model."""

from collections.abc import Callable
from pathlib import Path

from transformers import PreTrainedModel

from petl.adapters.export.card import write_companions
from petl.adapters.export.checked_folder import (
    OutputFolder,
    check,
    compare,
    outputs,
    save_model,
)
from petl.adapters.export.conversion import merged_model
from petl.adapters.export.saved_adapter import SavedAdapter, device
from petl.data.models.loading import load_base
from petl.data.tasks.base import Task
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.outputs import check_output, new_folder
from petl.system.progress import Pass

REREAD = 1e-6  # relative difference after writing and loading: rounding of another device at most


def merge(
    saved: SavedAdapter,
    out: Path,
    tolerance: float | None,
    also: Callable[[Path], None] = lambda folder: None,
) -> OutputFolder:
    """Write the base model with the adapter merged into it: a folder that `AutoModel` loads.

    Args:
        tolerance: the largest `Difference.relative`; None: by the dtype of the base model.
        also: writes further files into the folder, before it is loaded again.

    Raises:
        InputError: `out` is taken, the method cannot merge, or the base is another one.
        RunStopped: the merged model's outputs differ by more than `tolerance`.
    """
    check_output(out)
    merged, adapted = merged_model(saved, lossy=tolerance is not None)
    after = outputs(merged, adapted.batches, "the merged model")
    difference = compare(adapted.outputs, after, adapted.effect)
    check(difference, tolerance, merged.dtype, "merged model")
    with new_folder(out) as draft:
        with Pass("writing the merged model", None):
            save_model(merged, draft)
        write_companions(saved, draft, saved.config, merged=True)
        write_task_files(saved.task, merged, draft)
        also(draft)
        del merged  # frees memory before the same model is loaded again
        # loading may apply conversions of its own, so the files are checked as well
        reread = load_base(saved.model_at(draft), saved.task).to(device())
        written = outputs(reread, adapted.batches, "the written model")
        difference_of_files = compare(after, written, adapted.effect)
        check(difference_of_files, REREAD, reread.dtype, "merged model as written")
    return OutputFolder(out, difference)


def write_task_files(task: Task, model: PreTrainedModel, folder: Path) -> None:
    """Write the files beside a model by which other libraries know its task."""
    for name, content in task.model_files(model).items():
        (folder / name).parent.mkdir(exist_ok=True)
        content = content if isinstance(content, bytes) else as_json(content)
        write_atomic(folder / name, content)
