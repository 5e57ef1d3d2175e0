"""What a saved adapter's model has lost on retained texts: `petl eval RUN --retain`."""

from collections.abc import Sequence
from pathlib import Path

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.generation.prediction.evaluation import is_place
from petl.system.files.disk import as_json, check_writable, write_atomic
from petl.system.files.outputs import check_output
from petl.system.processes import is_first
from petl.training.distributed.launch import Launch, make_accelerator
from petl.training.retain.compare import measured
from petl.training.retain.drift import Drift
from petl.training.retain.measure import Retained
from petl.training.retain.page import TEXTS, TOKENS, write_texts
from petl.training.retain.rows import KEY, has_base
from petl.training.retain.texts import texts_for
from petl.training.runs.records import SCORES, read_scores

OWN = (SCORES, TEXTS, TOKENS), (TEXTS,)  # what it writes to its place in a run, with the mark of it
BATCH_SIZE = 8


def evaluate_retained(
    saved: SavedAdapter, names: Sequence[str], folder: Path | None, batch_size: int | None = None
) -> Retained | Drift:
    """Measure a saved adapter on retained texts, and write the result.

    A run whose scores.json has no such measure gets it there as well.

    Args:
        names: of files with a column `text`, or "bundled" alone.
        folder: of scores.json and retained.jsonl; None: nothing is written.

    Raises:
        InputError: a text, a file or the folder cannot be used.
        UnsupportedError: the model reads no texts.
    """
    if folder is not None and is_first():  # one process writes, all of them compute
        check_output(folder, *(OWN if is_place(saved, folder) else ()))
        check_writable(folder)
    # before a model is loaded
    texts = texts_for(names, saved.task, saved.settings)
    model, processor = saved.model(), saved.processor
    # others, such as CorDA, change the weights of their base
    base = None if has_base(saved.config) else saved.base().eval()
    size = batch_size or BATCH_SIZE
    # in the precision of the run, as the run itself
    with make_accelerator(Launch(), saved.precision).autocast():
        found, rows = measured(model, texts, processor, base=base, batch_size=size)
    if not is_first():
        return found
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_texts(folder, found, rows, processor)
        write_atomic(folder / SCORES, as_json({KEY: found.entry()}))
    if saved.run is not None and (saved.run / SCORES).is_file():
        scores = read_scores(saved.run)
        if KEY not in scores:
            write_texts(saved.run, found, rows, processor)
            write_atomic(saved.run / SCORES, as_json({**scores, KEY: found.entry()}, in_order=True))
    return found
