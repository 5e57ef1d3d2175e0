"""nested.json beside an adapter: the widths that it was trained at, and what their scale is.

A reader of the adapter could not know the scale of a smaller width without it. So `petl.load` reads
it, and a model writes it with the adapters of which it knows it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

from peft import PeftConfig, PeftModel

from petl.core.compat import extend_method, saved_folders
from petl.core.spec.components import SCALES
from petl.errors import InputError
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json

FILE = "nested.json"
KNOWN = "petl_nested"  # attribute of a PeftModel


class NestedContent(TypedDict):
    """The content of the file."""

    widths: list[int]
    scale: str


@dataclass(frozen=True)
class Nested:
    """What an adapter was trained at.

    Attributes:
        widths: rising, the last is its own.
        scale: of smaller widths, one of `SCALES`.
    """

    widths: tuple[int, ...]
    scale: str

    def at_width(self, k: int) -> "Nested":
        """Return that of the adapter of width `k`, whose smaller widths are still widths."""
        return Nested((*(each for each in self.widths if each < k), k), self.scale)

    def write(self, folder: Path) -> None:
        """Write the file into the folder of an adapter."""
        write_atomic(folder / FILE, as_json(asdict(self)))


def read(file: Path | None) -> Nested | None:
    """Return what the file beside an adapter says; None without one.

    Raises:
        InputError: it has other content.
    """
    if file is None:
        return None
    content: NestedContent = read_json(file, NestedContent)
    widths, scale = content["widths"], content["scale"]
    rising = widths and widths[0] > 0 and widths == sorted({*widths})
    if not rising or scale not in SCALES:
        raise InputError(
            f"{file} cannot be used: widths={widths} must rise from 1 or above, scale={scale!r} be "
            f"one of {', '.join(SCALES)}; restore it, or delete it if the adapter is not nested"
        )
    return Nested(tuple(widths), scale)


def remember(model: PeftModel, name: str, nested: Nested | None) -> None:
    """Make a model know what its adapter of this name was trained at, and save it; None: forget."""
    # a later adapter of the same name has another config
    known: dict[str, tuple[PeftConfig, Nested]] = vars(model).setdefault(KNOWN, {})
    if nested is None:
        known.pop(name, None)
    else:
        known[name] = model.peft_config[name], nested


def nested_of(model: PeftModel, name: str) -> Nested | None:
    """Return what an adapter of a model was trained at; None: it is not known to be nested."""
    config, nested = vars(model).get(KNOWN, {}).get(name, (None, None))
    return nested if config is model.peft_config[name] else None


def _save(original: Callable[..., None], model: PeftModel, *args: object, **kwargs: object) -> None:
    """Save adapters as `PeftModel.save_pretrained` does, nested ones with their file."""
    original(model, *args, **kwargs)
    if KNOWN not in vars(model):
        return
    for name, folder in saved_folders(model, args, kwargs)[0].items():
        nested = nested_of(model, name)
        if nested is not None:
            nested.write(folder)
        # of another adapter, which was saved there before
        else:
            (folder / FILE).unlink(missing_ok=True)


extend_method(PeftModel, "save_pretrained", _save)
