"""Find the run, adapter or model that a user names, without torch: a wrong name costs no import."""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from petl.errors import InputError
from petl.system.files.paths import why_impossible
from petl.system.files.read import read_json

ADAPTER = "adapter"  # the folder of the adapter in that of a run
CONFIG, SCORES = "config.yaml", "scores.json"  # of a run
ADAPTER_CONFIG, MODEL_CONFIG = "adapter_config.json", "config.json"  # of PEFT, of transformers
TASK_FILE, RETRIEVAL = "task.json", "retrieval"  # in an adapter's folder; a name that it may have
WITHOUT_TEXT = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")  # task_type of PEFT
DRAFTER_CONFIG = "drafter_config.json"
# one of which a folder has that can be named
KINDS = ("environment.json", ADAPTER_CONFIG, MODEL_CONFIG)
LOOKED_AT = 2000  # entries of folders, for a suggestion; assumption: a moment on any disk
SUGGESTED = 3


def folder_at(path: str | Path) -> Path:
    """Return a folder that a user names.

    Raises:
        InputError: there is none; the message suggests runs of similar names.
    """
    if not why_impossible(str(path)) and Path(path).suffix == ".gguf" and Path(path).is_file():
        raise InputError(
            f"{path} is a file of llama.cpp, which petl writes and does not read: give the folder "
            "of the model or run that it was made of, with --engine llama.cpp for llama.cpp's "
            f"speed, or start llama-server -m {path}"
        )
    if why_impossible(str(path)) or not Path(path).is_dir():
        hint = similar(path) or "; give the folder of a run, or of an adapter"
        raise InputError(f"{path} is not a directory{hint}")
    return Path(path)


def adapter_at(path: str | Path) -> Path:
    """Return the folder of the adapter of a run, or an adapter folder as it is.

    Raises:
        InputError: there is no such folder, or no adapter in it.
    """
    folder = folder_at(path)
    adapter = adapter_in(folder)
    if (adapter / ADAPTER_CONFIG).is_file():
        return adapter
    if (folder / CONFIG).is_file():
        raise InputError(
            f"{path} is a run that has saved no adapter yet; finish it with train.resume={path}"
        )
    raise InputError(
        f"{path} contains neither {ADAPTER}/ nor {ADAPTER_CONFIG}; give the folder of a run, or "
        "of an adapter"
    )


def model_at(path: str | Path) -> Path:
    """Return the folder of an adapter as `adapter_at`, or that of a model or a drafter.

    Raises:
        InputError: as `adapter_at`.
    """
    folder = folder_at(path)
    # of which petl merge and petl draft write one each
    others = (MODEL_CONFIG, DRAFTER_CONFIG)
    return folder if any((folder / name).is_file() for name in others) else adapter_at(path)


def embedder_at(path: str | Path) -> Path:
    """Return what `model_at` does, unless an adapter there has learned another task."""
    folder = model_at(path)
    name = _entry(folder / TASK_FILE, "task")
    if name and name != RETRIEVAL:
        raise no_embedder(name)
    return folder


def no_embedder(task: str) -> InputError:
    """Return the error for a run of a task without vectors."""
    return InputError(f"the run is of data.task={task}: vectors need data.task={RETRIEVAL}")


def writer_at(path: str | Path) -> Path:
    """Return what `model_at` does, unless an adapter there is of a kind that writes no text."""
    folder = model_at(path)
    kind = _entry(folder / ADAPTER_CONFIG, "task_type")
    if kind in WITHOUT_TEXT:
        raise no_writer(path, kind)
    return folder


def no_writer(path: str | Path, kind: str) -> InputError:
    """Return the error for a model that writes no text; `kind` names what it is."""
    return InputError(
        f"{path} does not write text ({kind}): give a model of data.task=causal_lm or seq2seq; "
        "`petl predict` labels examples"
    )


def _entry(file: Path, name: str) -> str:
    """Return the text `name` of a JSON file; "" if it has none."""
    entry = read_json(file, dict).get(name) if file.is_file() else None
    return entry if isinstance(entry, str) else ""


def run_at(path: str | Path) -> Path:
    """Return the folder of a run, finished or not.

    Raises:
        InputError: there is no such folder, or no run in it.
    """
    folder = folder_at(path)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{path} is not the folder of a run: it has no {CONFIG}{similar(path)}")
    return folder


def adapter_in(folder: str | Path) -> Path:
    """Return the folder of the adapter in the folder of a run, or an adapter folder as it is."""
    inside = Path(folder, ADAPTER)
    return inside if inside.is_dir() else Path(folder)


def look_for_scores(paths: Iterable[str]) -> None:
    """Raise InputError if there are no scores in or below any of these folders."""
    missing = ""
    for path in paths:
        # the first one is enough: all are read later
        if next(Path(path).rglob(SCORES), None) is not None:
            return
        reason = "is not a directory" if Path(path).exists() else "does not exist"
        here = f"no finished run in {path}" if Path(path).is_dir() else f"{path} {reason}"
        missing = missing or f"{here}{similar(path)}"
    raise InputError(f"no finished run to compare: {missing}")


def similar(path: str | Path) -> str:
    """Return the end of a message about a folder that is wrong: runs that may be meant, or ""."""
    # beside the folder that is named, here, and in runs, outputs and other folders here
    here = Path()
    near = [Path(path).parent, here, *(entry for entry in folders_in(here))]
    found = {
        folder.name: str(folder)
        for parent in dict.fromkeys(near)
        for folder in folders_in(parent)
        if folder != Path(path) and any((folder / name).is_file() for name in KINDS)
    }
    close = get_close_matches(Path(path).name[:100], found, n=SUGGESTED, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(found[name] for name in close)}?"
    # names of runs end with their time, so that few are similar to a short word
    newest = sorted(found.values(), key=lambda each: Path(each).stat().st_mtime, reverse=True)
    return f"; the newest here: {', '.join(newest[:SUGGESTED])}" if newest else ""


def folders_in(parent: Path) -> Iterator[Path]:
    """Yield folders in another one, which need not exist, hidden ones left out."""
    try:
        entries = islice(parent.iterdir(), LOOKED_AT)
        yield from (e for e in entries if not e.name.startswith(".") and e.is_dir())
    except OSError:  # it is none, or cannot be read
        return
