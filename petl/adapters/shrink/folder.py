"""A folder with a shrunk model: the weights, and widths.json where MLPs have unequal widths."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from petl.adapters.shrink.config import odd_parameters
from petl.core.layers.layer import shape_of
from petl.core.model.changed import load_changed
from petl.core.model.layer_widths import FILE, put_widths, read_widths
from petl.errors import InputError, first_line
from petl.system.files.disk import as_json, write_atomic
from petl.training.ranks.importance import blocks_of


def widths_in(model: PreTrainedModel) -> dict[str, list[int]]:
    """Return inputs and outputs of the layers that differ from the model's config, by path."""
    odd = {name.rpartition(".")[0] for name in odd_parameters(model, blocks_of(model))}
    paths = [path for path, _ in model.named_modules() if path in odd]
    return {path: [*shape_of(model.get_submodule(path))] for path in paths}


def write_widths(model: PreTrainedModel, folder: Path) -> None:
    """Write widths.json into a model's folder, if the class of the model needs it."""
    layers = widths_in(model)
    if layers:
        write_atomic(folder / FILE, as_json({"layers": layers}, in_order=True))


def load_shrunk(folder: str | Path) -> PreTrainedModel:
    """Load a model that `petl shrink` wrote, with equal or unequal widths, in evaluation mode.

    The class and the dtype are those that were saved.

    Raises:
        InputError: there is no such model, or widths.json does not fit it.
    """
    folder = Path(folder)
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    layers = read_widths(folder)
    return load_changed(config, folder, lambda model: put_widths(model, layers, folder), FILE)
