"""The folder of a saved drafter: its config, its tensors, and a page that describes it."""

import hashlib
import json
import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.core.compat import AuxiliaryTrainingWrapper, BaseTunerLayer
from petl.core.fingerprint import fingerprint
from petl.core.types import Settings, base_of
from petl.efficiency.drafting.registry import Drafter, DrafterConfig, check_vocabulary, of_fields
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


# Hashes that tell which model and tokenizer a drafter was trained for


def hashes_of(model: nn.Module) -> dict[str, str]:
    """Return hashes of a model's weights by what a drafter needs of them.

    `base` is of the input embedding and the output head, which a drafter reads; `adapter` of all
    other weights and of the active adapters, which decide what the model writes. Both are of
    samples, rounded to bfloat16: see petl.core.fingerprint.
    """
    base = base_of(model)
    # adapters that do not compute have no part in what the model writes
    active, inactive = _adapters(base)
    ends = {
        id(parameter)
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
        for name, parameter in _own(module).named_parameters()
    }
    digests, parts = fingerprint(base), {"base": {}, "adapter": {}}
    for name, parameter in base.named_parameters():
        words = name.split(".")
        if name in digests and not inactive & {*words}:
            kind = "base" if id(parameter) in ends else "adapter"
            # neither how an adapter is called nor that one wraps a layer is part of the weights
            short = ".".join(w for w in words if w not in active and w != "base_layer")
            parts[kind][short] = digests[name]
    return {kind: _hash(found) for kind, found in parts.items()}


def hash_of_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of the tokens and their ids."""
    return _hash(tokenizer.get_vocab())


def _adapters(base: nn.Module) -> tuple[set[str], set[str]]:
    """Return the names of the adapters that compute, and of the others."""
    known = {*getattr(base, "peft_config", {})}
    active: set[str] = set()
    for module in base.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            names = module.active_adapters if not module.disable_adapters else []
            active |= {*names}
    return active, known - active


def _own(module: nn.Module) -> nn.Module:
    """Return a layer without its adapter, whose weights are not those of the base."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return getattr(module, "original_module", module)


def _hash(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
