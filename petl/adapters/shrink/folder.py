"""A folder with a shrunk model: the weights, and widths.json where MLPs have unequal widths."""

from pathlib import Path

from transformers import AutoConfig, PreTrainedModel

from petl.core.model.changed import load_changed
from petl.core.model.layer_widths import FILE, put_widths, read_widths
from petl.errors import InputError, first_line
from petl.system.files.paths import model_folder
from petl.system.values import FREE


def load_shrunk(folder: str | Path) -> PreTrainedModel:
    """Load a shrunk model from its folder, with equal or unequal widths, in evaluation mode.

    The class and the dtype are those that were saved.

    Raises:
        InputError: there is no such model, or widths.json does not fit it.
    """
    FREE.check("folder", folder, str | Path)
    folder = model_folder("folder", str(folder))
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    layers = read_widths(folder)
    return load_changed(config, folder, lambda model: put_widths(model, layers, folder), FILE)
