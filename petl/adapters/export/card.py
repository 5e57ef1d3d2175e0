"""The model card of what is exported from, or uploaded of, a saved adapter."""

from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.data.models.loading import save_processor
from petl.data.models.sources import read_source
from petl.data.tasks.task_file import FILE as TASK
from petl.system.files.disk import copy_file, write_atomic
from petl.system.files.paths import LABELS, OnHub
from petl.training.runs.card_code import BASE
from petl.training.runs.config import names_of
from petl.training.runs.model_card import README, CardInfo, known_base, model_card
from petl.training.runs.records import ENVIRONMENT, is_finished, read_environment, read_scores


def described(
    saved: SavedAdapter, config: PeftConfig, base: OnHub | None = None, **more: Any
) -> CardInfo:
    """Return what a card says about an adapter.

    Args:
        config: of the adapter that the card is for.
        base: where the Hub has the base model; None: as the run or adapter has it.
        more: further fields of `CardInfo`.

    Raises:
        InputError: a file of its run is damaged.
    """
    run, source = saved.run, read_source(saved.settings["model"])
    return CardInfo(
        saved.task,
        source,
        config,
        base or known_base(source, saved.config.revision),
        saved.settings,
        # scores of an unfinished run would look like its result
        read_scores(run) if run and is_finished(run) else {},
        read_environment(run) if run and (run / ENVIRONMENT).is_file() else {},
        run_names=names_of(saved.settings) if run else (),
        **more,
    )


def copy_if_present(source: Path, target: Path) -> None:
    """Copy a file, if there is one, into a folder that need not exist."""
    if source.exists():
        target.parent.mkdir(exist_ok=True)
        copy_file(source, target)


def whole_processor(saved: SavedAdapter) -> Any:
    """The processor as a whole model has it, which other libraries read: see `saved_tokenizer`."""
    own = saved.processor
    is_tokenizer = isinstance(own, PreTrainedTokenizerBase)
    return saved.task.saved_tokenizer(own) if is_tokenizer else own


def write_companions(saved: SavedAdapter, folder: Path, config: PeftConfig, **more: Any) -> None:
    """Write processor, names of labels and card of an adapter into the folder of its export.

    Args:
        config, more: as of `described`.
    """
    own = whole_processor(saved) if more.get("merged") else saved.processor
    save_processor(saved.settings["model"], saved.task, folder, own)
    # a merged model has label names in its own config, and is no adapter
    if not more.get("merged"):
        for name in (LABELS, TASK, f"{BASE}/{CONFIG_NAME}"):
            copy_if_present(saved.adapter / name, folder / name)
    write_atomic(folder / README, model_card(described(saved, config, **more)))
