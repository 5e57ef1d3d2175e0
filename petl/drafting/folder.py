"""The folder of a saved drafter: its config, its tensors, and a page that describes it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from safetensors.torch import save_file
from torch import Tensor

from petl.drafting.registry import Drafter, drafter
from petl.errors import InputError
from petl.files.disk import write_json
from petl.files.read import read_json
from petl.files.tensor_file import read_file

CONFIG, WEIGHTS = "drafter_config.json", "drafter_model.safetensors"


class DrafterConfig(TypedDict):
    """The content of drafter_config.json.

    Attributes:
        name: in the registry.
        fields: of the drafter.
        vocabulary: number of tokens; 0 if any will do.
        hashes: of base model, adapter and tokenizer, by these names, as far as they are known.
        frequencies: rank frequencies by depth, then rank.
        calibration: weight and bias of the calibrated acceptance; empty: none.
    """

    name: str
    fields: dict[str, Any]
    vocabulary: int
    hashes: dict[str, str]
    frequencies: list[list[float]]
    calibration: list[float]


def write(
    folder: str | Path,
    name: str,
    fields: Mapping[str, Any],
    *,
    vocabulary: int = 0,
    frequencies: Sequence[Sequence[float]] = (),
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a drafter to a folder, which is created."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    config: DrafterConfig = {
        "name": name,
        "fields": dict(fields),
        "vocabulary": vocabulary,
        "hashes": {},
        "frequencies": [[*row] for row in frequencies],
        "calibration": [],
    }
    if tensors:
        save_file(
            {key: t.detach().cpu().contiguous() for key, t in tensors.items()}, target / WEIGHTS
        )
    # last, so that a folder with a config has its tensors
    write_config(target, config)


def write_config(folder: Path, config: DrafterConfig) -> None:
    """Write the config of a drafter."""
    write_json(folder / CONFIG, config)


def read(folder: Path) -> DrafterConfig:
    """Read the config of a drafter.

    Raises:
        InputError: there is none, or it is damaged.
    """
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} has no {CONFIG}: give the folder of a drafter")
    return read_json(folder / CONFIG, DrafterConfig)


def load_drafter(folder: str | Path, model: Any) -> Drafter:
    """Load a saved drafter for a model.

    Args:
        folder: with drafter_config.json, such as RUN/drafter.
        model: that it will draft for.

    Raises:
        InputError: there is no drafter, its files are damaged, or it has another vocabulary than
            the model.
    """
    source = Path(folder)
    config = read(source)
    size = vocabulary_of(model)
    # the size is enough: with another model of that size drafts are worse, answers the same
    if config["vocabulary"] not in (0, size):
        raise InputError(
            f"the drafter in {source} has a vocabulary of {config['vocabulary']} tokens and "
            f"{type(model).__name__} one of {size}: it belongs to another model"
        )
    found = drafter(config["name"], model=model, **config["fields"])
    tensors = read_file(source / WEIGHTS)[1] if (source / WEIGHTS).is_file() else {}
    found.restore(config, tensors)
    return found


def vocabulary_of(model: Any) -> int:
    """Return the number of tokens of a model.

    Raises:
        InputError: there is no model.
    """
    if model is None:
        raise InputError(f"model={model}: this drafter needs the model that it drafts for")
    # not the tokenizer's number: heads are often filled up to a round number of rows
    return model.config.get_text_config().vocab_size
