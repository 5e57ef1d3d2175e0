"""Models of transformers some of whose modules differ from those that their class builds."""

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import transformers
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from petl.core.compat import extend_method
from petl.core.layers.class_swap import mixins_of, restore_class
from petl.core.spec.config import require
from petl.core.types import Record
from petl.errors import InputError, first_line
from petl.system.files.disk import as_json, write_atomic
from petl.system.files.read import read_json

M = TypeVar("M", bound=nn.Module)
# of a module: dicts of hooks, which a copy does not take over
KNOWN = "petl_files"  # attribute of a model: by name of a file, its content
HOOKS = tuple(name for name in vars(nn.Module()) if name.endswith("_hooks"))


def changed_copy(model: M, changes: Mapping[int, object]) -> M:
    """Return a copy of a model with other modules or tensors, without hooks and swapped classes.

    Args:
        model: stays as it is; what is replaced is not copied.
        changes: what stands in the place of an object, by its `id`.
    """
    memo: dict[int, Any] = dict(changes)  # what `deepcopy` puts in the place of an object
    for module in model.modules():
        memo |= {id(getattr(module, hooks)): OrderedDict() for hooks in HOOKS}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for mixin in mixins_of(module):
            restore_class(module, mixin)
    return copied


@contextmanager
def changed_class(cls: type[M], change: Callable[[M], None]) -> Generator[type[Any]]:
    """Yield a class that builds models of `cls` and changes them before weights are read.

    Models that were loaded by it in the block have the class `cls` after it.
    """
    made = []

    def init(self: M, *args: object, **kwargs: object) -> None:
        cls.__init__(self, *args, **kwargs)
        change(self)
        made.append(self)

    # under the same name, from which transformers chooses the loss
    yield type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})
    # models of the derived class could not be pickled
    for model in made:
        model.__class__ = cls


def load_changed(
    config: PretrainedConfig, folder: Path, change: Callable[[PreTrainedModel], None], file: str
) -> PreTrainedModel:
    """Load a model from its folder, in evaluation mode, with modules that `change` has put in it.

    Args:
        config: of the model.
        folder: with the weights.
        change: is called with the new model before its weights are read.
        file: name of the file that says what is changed, for messages.

    Raises:
        InputError: the folder has other tensors than the changed model.
    """
    cls = model_class(config, folder)
    try:
        with changed_class(cls, change) as changed:
            model, report = changed.from_pretrained(
                str(folder),
                config=config,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are in the report, and raise below
                use_kernels=False,  # as where base models are loaded
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(kind):
            first = sorted(map(str, report[kind]))[0]
            problem = f"{kind.replace('_', ' ')}, such as {first}"
            if not (folder / file).is_file():
                raise InputError(
                    f"{folder} does not fit {cls.__name__}, and has no {file} that says how it "
                    f"differs: {problem}; save the model again, or copy the file"
                )
            raise InputError(f"{folder} does not fit {cls.__name__} and its {file}: {problem}")
    return model.eval()


def model_class(config: PretrainedConfig, folder: Path) -> type[PreTrainedModel]:
    """Return the class of transformers that a config, or the one in the folder, names."""
    names = config.architectures
    if not names:
        names = read_json(folder / "config.json", dict[str, Any]).get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    require(
        isinstance(found, type) and issubclass(found, PreTrainedModel),
        f"{folder / 'config.json'} names no model class of transformers in architectures "
        f"({name!r}); set config.architectures",
    )
    assert isinstance(found, type)
    return found


# What a model saves of it beside its weights


def remember(model: nn.Module, file: str, content: Record) -> None:
    """Make a model write a JSON file beside its weights, also a copy or from a pickle.

    Without content it removes the file, which is of another model that was saved there before.
    """
    vars(model).setdefault(KNOWN, {})[file] = content


def _save(original: Callable[..., None], model: Any, *args: object, **kwargs: object) -> None:
    """Save a model as `save_pretrained` does, and the files that it is known to have."""
    original(model, *args, **kwargs)
    given = inspect.signature(original).bind(model, *args, **kwargs).arguments
    if not given.get("is_main_process", True):
        return
    for name, content in vars(model).get(KNOWN, {}).items():
        file = Path(given["save_directory"], name)
        if content:
            write_atomic(file, as_json(content, in_order=True))
        else:
            file.unlink(missing_ok=True)


extend_method(PreTrainedModel, "save_pretrained", _save)
