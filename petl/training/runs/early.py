"""What of a run's settings is checked before torch is imported: a misspelt name costs no import."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from petl.data.base import Source, check_early, data_source
from petl.errors import InputError
from petl.system.files.paths import is_repository, model_folder
from petl.system.settings.schema import plain
from petl.training.runs.lookup import folder_at, model_at
from petl.training.runs.settings import no_class, read_train

READ = 2**23  # bytes of files whose labels are read for their names; assumption: half a second


def read_early(cfg: DictConfig | Mapping[str, object]) -> None:
    """Check the settings of a run, or of a command about one, as far as it needs no torch.

    Raises:
        InputError: as `check_early` and `read_train`; or a folder that the settings name is not
            there, or a class.
    """
    read_train(cfg)
    check_early(cfg)
    settings = plain(cfg)
    model, train = settings.get("model"), settings["train"]
    if isinstance(model, Mapping) and model.get("source") == "path":
        model_folder("model.path", str(model.get("path")))
    if train.get("resume") not in (None, "auto"):
        with_name("train.resume", train["resume"], folder_at)
    start = train.get("init_from")
    # OWNER/NAME may be on the Hub, which is asked later
    if start is not None and not ("/" in str(start) and is_repository(str(start))):
        with_name("train.init_from", start, model_at)
    weights = train.get("class_weights")
    known = classes_of(data_source(settings["data"])) if isinstance(weights, Mapping) else []
    # without known classes, the run compares the names
    unknown = [str(name) for name in weights if str(name) not in known] if known else []
    if unknown:
        raise no_class(unknown[0], known)


def with_name(setting: str, value: object, find: Any) -> None:
    """Find a folder that a setting names.

    Raises:
        InputError: as `find`, with the name of the setting.
    """
    try:
        find(str(value))
    except InputError as error:
        raise InputError(f"{setting}={error}") from error


def classes_of(source: Source) -> list[str]:
    """Return the names of the classes of rows; [] if they are not known without a long reading."""
    # the imports of pyarrow are for runs with weights alone
    from petl.data.bundled import WORDNET_CLASSES, WordNet
    from petl.data.files import Files, file_names, read_rows
    from petl.data.task_columns import ClassLabelColumns

    if isinstance(source, WordNet):
        return WORDNET_CLASSES
    columns = source.task_columns if isinstance(source, Files) else None
    if not isinstance(source, Files) or not isinstance(columns, ClassLabelColumns):
        return []
    if source.labels is not None:
        return source.labels
    files = file_names("data.train", source.train)
    # of larger files, the run compares the names once it has read them
    if sum(Path(file).expanduser().stat().st_size for file in files) > READ:
        return []
    return [*columns.counted(read_rows("data.train", files, columns.choose, source.written))]
