"""What of a run's settings is checked before torch is imported: a misspelt name costs no import."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from petl.data.base import SEVERAL, Source, check_early, data_source
from petl.data.models.sources import ModelSource, read_source
from petl.errors import InputError, UnknownNameError, did_you_mean
from petl.system.files.paths import is_repository
from petl.system.files.read import read_json, read_yaml
from petl.system.imports.tables import LOSSES, METHODS
from petl.system.settings.schema import plain
from petl.system.values import check_rules, read_fields
from petl.training.retain.settings import RetainConfig
from petl.training.runs.lookup import CONFIG, folder_at, model_at
from petl.training.runs.settings import no_class, read_train

READ = 2**23  # bytes of files whose labels are read for their names; assumption: half a second
INDEXES = {"method": METHODS, "loss": LOSSES}  # of groups whose fields are in petl's index
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")  # of modules, and no regular expression


def read_early(cfg: DictConfig | Mapping[str, object]) -> None:
    """Check the settings of a run, or of a command about one, as far as it needs no torch.

    Raises:
        InputError: as `check_early` and `read_train`; or a folder that the settings name is not
            there, or a class; or a field of the method, the loss, `retain` or the model is wrong.
    """
    read_train(cfg)
    check_early(cfg)
    settings = plain(cfg)
    look_up_fields(settings)
    train = settings["train"]
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


def look_up_fields(settings: Mapping[str, object]) -> None:
    """Look up the fields of the groups `method`, `loss`, `retain` and `model` as far as possible.

    Raises:
        InputError: a value is wrong, or a target is no module of the model.
    """
    for group, table in INDEXES.items():
        given = settings.get(group)
        # a plugin's is not in the index
        if isinstance(given, Mapping) and given.get("name") in table.index:
            table.index[given["name"]].check(group, given)
    retain, model, method = (settings.get(name) for name in ("retain", "model", "method"))
    if isinstance(retain, Mapping):
        check_rules(read_fields(RetainConfig, retain, "retain"), "retain")
    if isinstance(model, Mapping):
        source = read_source(model)
        source.check()
        targets = method.get("target_modules") if isinstance(method, Mapping) else None
        look_up_targets(source, [targets] if isinstance(targets, str) else targets or [])


def look_up_targets(source: ModelSource, targets: Iterable[object]) -> None:
    """Look up targets that are words in the weights of a model that is here, and in its source.

    Raises:
        UnknownNameError: one is in neither, so that it is no module.
    """
    words = [word for word in targets if isinstance(word, str) and NAME.fullmatch(word)]
    folder = source.local() if words else None
    if folder is None:
        return
    tensors, written = names_in(folder), source_of(folder)
    for word in words:
        last = word.rpartition(".")[2]
        if not tensors or not written or last in tensors:
            continue
        if re.search(rf"\b{last}\b", written) is None:
            raise UnknownNameError(
                f"method.target_modules: {word!r} is no module of {source.name}"
                f"{did_you_mean(word, [part for part in tensors if not part.isdigit()])}"
            )


def names_in(folder: Path) -> set[str]:
    """Return the names of the modules that have weights in a folder; none, if it is not known."""
    index, file = folder / "model.safetensors.index.json", folder / "model.safetensors"
    keys: Iterable[str] = ()
    try:
        if index.is_file():
            keys = json.loads(index.read_bytes())["weight_map"]
        elif file.is_file():
            with file.open("rb") as opened:
                size = int.from_bytes(opened.read(8), "little")
                keys = json.loads(opened.read(min(size, READ)))
    except (ValueError, LookupError):  # a damaged file, which loading the model tells
        return set()
    return {part for key in keys for part in key.split(".")[:-1]}


def source_of(folder: Path) -> str:
    """Return the source of transformers' model of the type that a folder has; "" without one.

    With it are the former names of modules, and petl's own words.
    """
    kind = str(read_json(folder / "config.json", dict[str, Any]).get("model_type") or "")
    package, own = find_spec("transformers"), find_spec("petl")
    if package is None or package.origin is None or own is None or own.origin is None:
        return ""
    library = Path(package.origin).parent
    files = [*(library / "models" / kind.replace("-", "_")).glob("modeling_*.py")]
    if not files:
        return ""
    files += [library / "conversion_mapping.py", Path(own.origin).parent / "core/model/names.py"]
    return "\n".join(file.read_text("utf-8") for file in files if file.is_file())


def look_up_columns(run: str, names: Sequence[str], words: Sequence[str], *, labels: bool) -> None:
    """Look up the columns that a run reads in files of texts, if they are known without torch.

    Args:
        run: the folder of a run, or of an adapter alone, of which nothing is known.
        names: of the files.
        words: settings of columns, such as "data.text=review".
        labels: True if the rows have labels.

    Raises:
        InputError: a file is not there, or its first row lacks a column.
    """
    # the imports of pyarrow are for these commands alone
    from petl.data.files import Files, data_file
    from petl.data.tabular import TASK_COLUMNS
    from petl.data.task_columns import NamedColumns

    file = Path(run, CONFIG)
    run_data = read_yaml(file, dict[str, Any]).get("data") if file.is_file() else None
    data = run_data if isinstance(run_data, Mapping) else {}
    kind = TASK_COLUMNS.get(str(data.get("task")))
    for name in names if kind is not None else ():
        if name != "-" and not Path(name).is_dir():
            data_file("FILE", name)
    # other tasks choose by more than names, and of several sets the task knows the columns
    if kind is None or not issubclass(kind, NamedColumns) or data.get("tasks"):
        return
    if not names or data.get("source") in SEVERAL or any(Path(name).is_dir() for name in names):
        return
    given = {word.partition("=")[0].removeprefix("data."): word.partition("=")[2] for word in words}
    known = {name: given.get(name, data.get(name)) for name in kind.own_settings}
    base = {"name": "files", "source": "files", "task": data["task"], "train": [*names]}
    source = read_fields(Files, {**known, **base}, "data")
    columns = kind(source, labeled=labels)
    columns.of_run = True
    source.check_columns(columns)


def with_name(setting: str, value: object, find: Callable[[str], object]) -> None:
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
