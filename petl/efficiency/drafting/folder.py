"""The folder of a saved drafter: its config, its tensors, and a page that describes it."""

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.core.types import Settings
from petl.efficiency.drafting.fields import check_vocabulary
from petl.efficiency.drafting.identity import hash_of_tokenizer, hashes_of
from petl.efficiency.drafting.registry import Drafter, DrafterConfig, of_fields
from petl.errors import InputError
from petl.system.files.disk import check_links, write_json
from petl.system.files.read import read_json
from petl.system.files.tensor_file import read_file

logger = logging.getLogger(__name__)
CONFIG, WEIGHTS = "drafter_config.json", "drafter_model.safetensors"
PATHS = ("table",)  # fields that name folders


def write(
    folder: str | Path,
    name: str,
    fields: Settings,
    *,
    vocabulary: int = 0,
    hashes: Mapping[str, str] | None = None,
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
        "hashes": dict(hashes or {}),
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


def load_drafter(
    folder: str | Path, model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None
) -> Drafter:
    """Load a saved drafter for a model.

    With other weights than it was trained for, such as another adapter, it decodes correctly but
    slower: a warning says so.

    Args:
        folder: with drafter_config.json, such as RUN/drafter.
        model: that it will draft for, with its adapters.
        tokenizer: of the model, to be compared with that of the training; None: it is not.

    Raises:
        InputError: there is no drafter, its files are damaged, or it belongs to another base model
            or tokenizer.
    """
    source = Path(folder)
    check_links(source)
    config = read(source)
    # the size is enough where there are no hashes: drafts are worse, answers the same
    check_vocabulary(f"the drafter in {source}", config["vocabulary"], model)
    _check_hashes(source, config["hashes"], model, tokenizer)
    with named(source / CONFIG):
        # a path in a config from elsewhere could name any file of the user
        paths = [name for name in PATHS if config["fields"].get(name) is not None]
        if paths:
            raise InputError(
                f"the field {paths[0]} names a folder, {config['fields'][paths[0]]!r}, which a "
                "saved drafter may not read: its tensors are in its own folder; remove the field"
            )
        found = of_fields(config["name"], model, config["fields"])
    tensors = read_file(source / WEIGHTS)[1] if (source / WEIGHTS).is_file() else {}
    with named(source):
        found.restore(config, tensors)
    return found


def _check_hashes(
    source: Path,
    saved: Mapping[str, str],
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Refuse another embedding, head or tokenizer; warn of other weights between them."""
    present = hashes_of(model) if saved else {}
    if "tokenizer" in saved and tokenizer is not None:
        present["tokenizer"] = hash_of_tokenizer(tokenizer)
    others = [name for name in present if name in saved and saved[name] != present[name]]
    for name, what in (("base", "base model"), ("tokenizer", "tokenizer")):
        if name in others:
            raise InputError(
                f"the drafter in {source} was trained for another {what}: train one for this model "
                "with petl draft, or decode with --drafter free"
            )
    if "adapter" in others:
        logger.warning(
            "the drafter in %s was trained for other weights (another adapter, or one that is "
            "merged now): it decodes correctly, but perhaps slower; train one for these with petl "
            "draft",
            source,
        )


@contextmanager
def named(place: Path) -> Generator[None]:
    """Add the place that they are from to errors about the content of files."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
