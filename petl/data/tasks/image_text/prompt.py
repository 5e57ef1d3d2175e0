"""Conversations with images as a model reads them, with the processor and chat template of it.

A processor writes a mark for each image into the text of a conversation, and expands it to the
tokens that stand for the image, as many as its pixels need. It reads a whole batch at once, since
only it knows the layout of its tensors.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import BatchEncoding, PreTrainedTokenizerBase

from petl.data.models.image_processor import MARKED_BY_ITSELF
from petl.data.tasks import Message
from petl.data.tasks.image_text.images import ImageSource, image_of
from petl.errors import InputError, first_line

IMAGE = "image"  # type of a part of a message


class ImageTextProcessor(Protocol):
    """What is used of the processors of transformers for images and text."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Callable[..., object]
    chat_template: str | dict[str, str]

    def __call__(self, **inputs: object) -> Mapping[str, Any]:
        """The inputs of a model."""

    def apply_chat_template(self, conversation: object, **options: object) -> str:
        """The text of a conversation."""

    def save_pretrained(self, folder: object) -> object:
        """Write the processor into a folder."""


def adds_special_tokens(processor: ImageTextProcessor, text: str) -> bool:
    """Return True unless the template has written the first token, as transformers decides it."""
    first = processor.tokenizer.bos_token
    return not (isinstance(first, str) and text.startswith(first))


def marks_itself(processor: ImageTextProcessor) -> bool:
    """Return True if a processor puts the mark of one image before each text."""
    return type(processor).__name__ in MARKED_BY_ITSELF


def model_inputs(
    processor: ImageTextProcessor,
    texts: Sequence[str],
    images: Sequence[Sequence[ImageSource]],
    **options: object,
) -> dict[str, Any]:
    """The inputs of a model for rendered conversations with their images.

    Args:
        options: of the processor, such as `return_tensors`.

    Raises:
        InputError: the processor refuses them.
    """
    # one that marks images itself adds these tokens around the question
    adds = {not marks_itself(processor) and adds_special_tokens(processor, t) for t in texts}
    assert len(adds) == 1, "texts of one template"
    decoded = [[image_of(each) for each in own] for own in images]
    try:
        # without any image, some processors fail on empty lists
        given = decoded if any(decoded) else None
        return dict(
            processor(text=[*texts], images=given, add_special_tokens=adds.pop(), **options)
        )
    # processors raise many types: for sides of extreme proportions, marks without an image, ...
    except Exception as error:
        reason = first_line(error) or type(error).__name__
        raise InputError(f"{type(processor).__name__} refuses the images: {reason}") from error


class _Remembering:
    """An image processor that computes the images of each beginning of a conversation once.

    Attributes:
        count: number of images of the beginning that is encoded now.
    """

    def __init__(self, inner: Callable[..., object]) -> None:
        self.inner, self.count = inner, 0
        self.found: dict[tuple[int, str], object] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def __call__(self, images: object, **options: object) -> object:
        # beginnings with as many images have the same ones
        key = self.count, str(options)
        if key not in self.found:
            self.found[key] = self.inner(images, **options)
        # a processor may remove entries of what it gets
        return copy.copy(self.found[key])


class ConversationEncoder:
    """Encodes one conversation, and beginnings of it, as `petl.data.tasks.chat` needs a tokenizer.

    Attributes:
        images: of the conversation, in its order.
        chat_template: of the processor.
    """

    is_fast = False  # beginnings are compared: marks of the assistant's text count no images

    def __init__(self, processor: ImageTextProcessor, images: Iterable[ImageSource] = ()) -> None:
        # a copy, since other threads use the processor as well
        self.processor = copy.copy(processor)
        self.memory = _Remembering(processor.image_processor)
        self.processor.image_processor = self.memory
        self.images = [image_of(each) for each in images]
        self.name_or_path = processor.tokenizer.name_or_path
        self.all_special_ids = processor.tokenizer.all_special_ids
        self.chat_template = processor.chat_template
        self.decode = processor.tokenizer.decode

    def get_chat_template(self, chat_template: None = None, tools: object = None) -> str:
        """The template as text."""
        template = self.chat_template
        # of a processor with several, as transformers chooses
        return template["default"] if isinstance(template, dict) else template

    def text(self, messages: Sequence[Message], **options: object) -> tuple[str, int]:
        """The text of turns with a mark for each image, and the number of their images.

        Raises:
            InputError: the template leaves out an image, or a text has the mark of one.
        """
        turns = [
            {**{key: value for key, value in turn.items() if key != "parts"}, "content": parts}
            for turn, parts in ((turn, contents(turn)) for turn in messages)
        ]
        text = self.processor.apply_chat_template(turns, tokenize=False, **options)
        count = sum(part["type"] == IMAGE for turn in turns for part in turn["content"])
        if marks_itself(self.processor):
            if count != 1:
                raise InputError(f"has {count} images, and the model reads one with a question")
            return text, count
        mark = getattr(self.processor, "image_token", None)
        found = count if mark is None else text.count(mark)
        if found != count:
            raise InputError(
                f"has {count} images, and its text has the mark of an image ({mark}) {found} "
                "times: a text has that mark, or the template leaves an image out"
            )
        return text, count

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        tokenize: bool = True,
        return_dict: bool = True,
        **options: object,
    ) -> BatchEncoding:
        """The tokens of turns, those of their images included."""
        text, count = self.text(messages, **options)
        self.memory.count = count
        inputs = model_inputs(self.processor, [text], [self.images[:count]])
        return BatchEncoding({"input_ids": [int(token) for token in inputs["input_ids"][0]]})


def contents(turn: Message) -> list[dict[str, str]]:
    """The content of a turn as templates take it: parts, always; images without their source."""
    parts = turn.get("parts") or [{"type": "text", "text": turn["content"]}]
    return [{"type": IMAGE} if part["type"] == IMAGE else part for part in parts]


@dataclass(frozen=True)
class ImagePrompt(Sequence[int]):
    """The tokens of a prompt, with the images that some of them stand for.

    Attributes:
        text: with a mark for each image.
        prepared: the inputs of a model for this prompt alone, if they were computed before.
    """

    ids: tuple[int, ...]
    text: str
    images: tuple[ImageSource, ...]
    processor: ImageTextProcessor
    prepared: dict[str, Tensor] | None = None

    def inputs(self) -> dict[str, Tensor]:
        """The inputs of a model for this prompt alone."""
        return prompt_inputs([self]) if self.prepared is None else self.prepared

    def __len__(self) -> int:
        return len(self.ids)

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...
    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        return self.ids[index]


@dataclass(frozen=True)
class Conversation:
    """A conversation to answer, with the images of its turns in their order."""

    messages: list[Message]
    images: tuple[ImageSource, ...] = ()


def prompt_inputs(prompts: Sequence[ImagePrompt], *, on_left: bool = True) -> dict[str, Tensor]:
    """The inputs of a model for prompts in one batch, padded on one side."""
    texts, images = [each.text for each in prompts], [each.images for each in prompts]
    side = "left" if on_left else "right"
    return model_inputs(
        prompts[0].processor, texts, images, padding=True, padding_side=side, return_tensors="pt"
    )


def training_inputs(
    processor: ImageTextProcessor,
    texts: Sequence[str],
    images: Sequence[Sequence[ImageSource]],
    multiple: int,
) -> dict[str, np.ndarray]:
    """The inputs of a model for conversations in one batch, padded on the right."""
    padding = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    more = {"pad_to_multiple_of": multiple} if multiple > 1 else {}
    # a plan makes batches where tensors have no values, which processors do not support
    with unset_fake_temporarily():
        inputs = model_inputs(processor, texts, images, **padding, **more)
        return {name: torch.as_tensor(value).numpy() for name, value in inputs.items()}
