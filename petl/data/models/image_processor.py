"""The processor of a model for images and text: tokenizer, image processor, chat template."""

from functools import cache
from importlib.util import find_spec
from inspect import Parameter, signature
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, cast

from transformers import AutoProcessor, PretrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import get_video_processor_config
from transformers.utils import VIDEO_PROCESSOR_NAME

from petl.errors import InputError, first_line
from petl.system.files.disk import as_json, write_atomic
from petl.system.imports.extras import optional

VIDEOS = "video_processor"
# Of an encoder-decoder whose processor has none: the text of one question, with its images.
QUESTION = (
    "{% for m in messages %}{% if m.role != 'user' or not loop.first %}"
    "{{ raise_exception('it has no chat template, and reads one question of the user') }}"
    "{% endif %}{% for p in m.content %}{% if p.type == 'image' %}MARK{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endfor %}"
)
LEFT_OUT = "_petl_videos"  # attribute with the settings of the part that is left out
MARKED_BY_ITSELF = ("Florence2Processor",)  # they put the mark of one image before each text


def load_image_text_processor(
    where: str | Path, config: PretrainedConfig, options: dict[str, object]
) -> ProcessorMixin:
    """Load the processor of a model, without its part for videos if torchvision is not installed.

    Args:
        where: folder or name on the Hub.
        config: of the model.
        options: of `from_pretrained`.

    Raises:
        InputError: there is none, it has no image processor, tokenizer or chat template, or Pillow
            is not installed. An encoder-decoder needs no template: `QUESTION` is put in its place.
    """
    optional("PIL.Image", "image")
    kind, settings_of_videos = AutoProcessor, cast(Any, get_video_processor_config)
    own: Any = PROCESSOR_MAPPING.get(type(config), None)
    if own is not None and VIDEOS in own.get_attributes() and find_spec("torchvision") is None:
        kind = without_videos(own)
    try:
        found = kind.from_pretrained(where, **options)
        if kind is not AutoProcessor:
            setattr(found, LEFT_OUT, settings_of_videos(where, **options))
    except ImportError as error:  # of transformers, with what to install
        raise InputError(
            f"the processor of {where} cannot be loaded: {first_line(error)}"
        ) from error
    if config.is_encoder_decoder and getattr(found, "chat_template", None) is None:
        own_mark = type(found).__name__ in MARKED_BY_ITSELF
        mark = "" if own_mark else getattr(found, "image_token", "")
        found.chat_template = found.tokenizer.chat_template = QUESTION.replace("MARK", mark)
    parts = ("tokenizer", "image_processor", "chat_template")
    missing = [name for name in parts if getattr(found, name, None) is None]
    if missing:
        raise InputError(
            f"the processor of {where} ({type(found).__name__}) has no {missing[0]}, which "
            "data.task=image_text needs: choose a model that was tuned for chats with images"
        )
    return found


@cache
def without_videos(kind: type[ProcessorMixin]) -> type[Any]:
    """Return a class of processors without the part for videos; its name is the same."""
    parts = [name for name in kind.get_attributes() if name != VIDEOS]
    # SmolVLM reads these for chats without a video, too
    unused = SimpleNamespace(num_frames=None, fps=None)
    own: dict[str, object] = {"get_attributes": classmethod(lambda cls: parts), VIDEOS: unused}
    init = kind.__init__
    # transformers reads the names of arguments in the code of the function
    if signature(init).parameters[VIDEOS].default is Parameter.empty:
        defaults = (None, *(init.__defaults__ or ()))
        own["__init__"] = FunctionType(
            init.__code__, init.__globals__, init.__name__, defaults, init.__closure__
        )
    # the name is saved
    return type(kind.__name__, (kind,), own)


def save_left_out(processor: object, folder: Path) -> None:
    """Write the settings of the part for videos that a processor was loaded without.

    Where torchvision is installed, transformers loads no processor without them.
    """
    if settings := getattr(processor, LEFT_OUT, None):
        write_atomic(folder / VIDEO_PROCESSOR_NAME, as_json(settings))
