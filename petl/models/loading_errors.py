"""What may be wrong with the files of a model, in one sentence."""

from collections.abc import Generator
from contextlib import contextmanager

from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_NAME, find_adapter_config_file
from transformers.utils import logging as transformers_logging

from petl.errors import InputError, first_line
from petl.files import hub
from petl.models.sources import Hub, ModelSource


@contextmanager
def loading(source: ModelSource) -> Generator[None]:
    """Turns what transformers says of a model that cannot be loaded into one sentence.

    Its progress bars and its table of new weights are silenced: `new_modules` tells of them.
    """
    bars, level = (
        transformers_logging.is_progress_bar_enabled(),
        transformers_logging.get_verbosity(),
    )
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise cannot_load(source, error) from error
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


def cannot_load(source: ModelSource, error: Exception) -> InputError:
    """The sentence for a model that transformers refused with `error`."""
    if "trust_remote_code" in str(error):
        return InputError(
            f"model {source.name} brings code of its own: read it, then say "
            "model.trust_remote_code=true"
        )
    if SAFE_WEIGHTS_NAME in str(error) and isinstance(error, OSError):  # "no file named ..."
        return InputError(
            f"model {source.name} has no {SAFE_WEIGHTS_NAME}, and no other file of weights is "
            "read, such files can hold code; if you trust it, load it with transformers alone, in "
            "the class for its task, save_pretrained it and its tokenizer, and say model=path "
            "model.path=FOLDER"
        )
    offline = isinstance(source, Hub) and source.options()["local_files_only"]
    if offline and isinstance(error, OSError):
        return hub.not_to_be_had("model", source.name)
    return InputError(f"model {source.name} cannot be loaded: {first_line(error)}")


def refuse_adapter(source: ModelSource) -> None:
    """Raise InputError if there is an adapter in the model's place: transformers would load it."""
    options = source.options()
    revision = options.get("revision", "main")
    local = options["local_files_only"]
    place = str(source.where())
    if find_adapter_config_file(place, revision=revision, local_files_only=local) is not None:
        raise InputError(
            f"model {source.name} holds an adapter (adapter_config.json): give the base model "
            "alone, or the two merged into one"
        )
