"""Conversations about images: the model writes the assistant's turns.

Encoded rows have tokens, those of images included, and where the images are: pixels are computed
for each batch, since they take a thousand times the room of the file.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from petl.data.conversations import with_parts
from petl.data.tasks import Message
from petl.data.tasks.base import (
    IGNORED,
    AutoModelClass,
    AutoProcessorClass,
    BaseFiles,
    Batch,
    Collate,
    Columns,
    Fields,
    Outputs,
    Pad,
    Row,
    Task,
    source_numbers,
)
from petl.data.tasks.causal_lm import DecoderTask, has_targets
from petl.data.tasks.chat import (
    encode_chat,
    excerpt,
    last_answer,
    last_learned,
    question,
    unpacked,
)
from petl.data.tasks.image_text.images import ImageSource, image_of, noise_image
from petl.data.tasks.image_text.prompt import (
    IMAGE,
    ConversationEncoder,
    ImagePrompt,
    ImageTextProcessor,
    training_inputs,
)
from petl.data.tasks.seq2seq import TextPairTask
from petl.errors import InputError
from petl.system.values import field, integer

if TYPE_CHECKING:
    from PIL.Image import Image

LETTERS = 8  # of a random text


@dataclass
class ImageText(DecoderTask[ImageTextProcessor], TextPairTask[ImageTextProcessor]):
    """Conversations (`messages`) with their `images`, and `sha256` of the content of each.

    Attributes:
        apart: the encoder of the model reads the question, and its decoder writes the last answer;
            None until the base is known.
    """

    name: ClassVar[str] = "image_text"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForImageTextToText
    processor_class: ClassVar[type[AutoProcessorClass]] = AutoProcessor
    tensors_by_row: ClassVar[bool] = False  # those of pixels have one for each image or patch
    encoded_at_once: ClassVar[int] = 64  # decoded images take more memory than tokens; assumption
    shown: ClassVar[tuple[str, ...]] = ("messages",)

    max_length: int = field(2048, integer(1))  # tokens, those of images included
    # maximum new tokens of generated answers
    generate: int | None = field(None, integer(1))
    apart: bool | None = None
    chat: ClassVar[bool] = True
    prompt_columns: ClassVar[tuple[str, ...]] = (
        *("_prompt", "_prompt_text", "_prompt_images", "images"),
    )

    @property
    def peft_task_type(self) -> str:  # ty: ignore[incompatible-property-override]
        """That of encoder-decoders, or of decoders."""
        return "SEQ_2_SEQ_LM" if self.apart else "CAUSAL_LM"

    @property
    def label_columns(self) -> tuple[str, ...]:  # ty: ignore[incompatible-property-override]
        """None of encoder-decoders, whose decoder reads the labels, shifted by one."""
        return () if self.apart else ("labels",)

    def take_base(self, base: BaseFiles) -> None:
        """See whether the model has an encoder."""
        self.apart = base.has_decoder

    def settings(self) -> Fields:
        """As of texts, with the version of Pillow, which decodes the images."""
        more = {"answers": True} if self.generate else {}
        more |= {"apart": True} if self.apart else {}
        return {**super().settings(), "pillow": version("pillow"), **more}

    @property
    def longest(self) -> int:
        """`max_length`, and the generated tokens after it."""
        return self.max_length + (self.generate or 0)

    def untruncated(self) -> None:
        """None: no row is truncated, since its images would lose their pixels."""
        return

    def why_dropped(self) -> str:
        return (
            f": longer than data.max_length={self.max_length} tokens, those of images included, or "
            "without an assistant turn"
        )

    def encode_rows(self, processor: ImageTextProcessor, rows: Columns, /) -> Columns:
        """Encode conversations; those that are too long are dropped, none is truncated."""
        given = zip(rows["messages"], rows["images"], rows["sha256"], strict=True)
        encoded = (self.encoded(processor, *each) for each in given)
        kept = {
            i: row
            for i, row in enumerate(encoded)
            if len(self.labeled_tokens(row)[0]) <= self.max_length
            and (row["labels"] if self.apart else has_targets(row["labels"]))
        }
        names = ["input_ids", "attention_mask", "labels", "text", "images"]
        names += [] if self.generate is None else [*self.prompt_columns, "_answer"]
        columns = {name: [row[name] for row in kept.values()] for name in dict.fromkeys(names)}
        return {**columns, **source_numbers(rows, kept)}

    def encoded(
        self,
        processor: ImageTextProcessor,
        messages: list[Message],
        images: list[str],
        digests: Sequence[str | None],
    ) -> Row:
        """Encode one conversation; with `generate` also the prompt of the last answer."""
        encoder = encoder_of(processor, messages, images)
        chat = unpacked(messages)
        turns, answer = chat.turns, ""
        prompt: Row = {}
        if any(chat.learned) and (self.apart or self.generate is not None):
            asked, answer = last_answer(encoder, messages)
            words, count = encoder.text(
                turns[: last_learned(chat)], **chat.options, add_generation_prompt=True
            )
            prompt = {"_prompt": asked, "_prompt_text": words, "_prompt_images": count}
        if self.apart and not prompt:
            ids, labels, text = [], [], ""  # no answer: it is dropped
        elif self.apart:
            ids, text, count = prompt["_prompt"], prompt["_prompt_text"], prompt["_prompt_images"]
            labels = processor.tokenizer(text_target=answer)["input_ids"]
            images, digests = images[:count], digests[:count]
        else:
            ids, labels = encode_chat(encoder, messages)
            text, _ = encoder.text(turns, **chat.options)
        row = {
            "input_ids": ids,
            "attention_mask": [1] * len(ids),
            "labels": labels,
            "text": text,
            # one text, not lists: batches are made of it, and runs are told apart by its bytes
            "images": json.dumps([*zip(images, digests, strict=True)]),
        }
        return {**row, **prompt, "_answer": answer}

    def collate(self, processor: ImageTextProcessor, /, multiple: int = 1) -> Collate:
        """A collate function that reads the images of the rows, and pads tokens and labels."""
        return BatchOfConversations(processor, multiple, apart=bool(self.apart))

    def random_batch(
        self, processor: ImageTextProcessor, count: int, draw: torch.Generator
    ) -> dict[str, Tensor]:
        """Inputs and labels of chats that each have a picture of noise and random letters."""
        letters = torch.randint(ord("a"), ord("z") + 1, (count, LETTERS), generator=draw).tolist()
        chats = [chat_about_image("".join(map(chr, each))) for each in letters]
        rows = [self.encoded(processor, chat, [noise_image(draw)], [None]) for chat in chats]
        return dict(self.collate(processor)(rows))

    def lengths(self, rows: Dataset) -> list[int]:
        """The number of tokens of each row, those of an answer of a decoder included."""
        return (TextPairTask if self.apart else Task).lengths(self, rows)

    def labeled_tokens(self, row: Row) -> tuple[list[int], list[bool]]:
        """The tokens of question and answer, and for each whether the model predicts it."""
        return (TextPairTask if self.apart else DecoderTask).labeled_tokens(self, row)

    def items(self, batch: Batch) -> int:
        """Number of predicted tokens."""
        return (TextPairTask if self.apart else DecoderTask).items(self, batch)

    def count(self, batch: Batch) -> int:
        """Number of tokens of questions and answers, without padding."""
        return (TextPairTask if self.apart else Task).count(self, batch)

    def positions(self, batch: Batch) -> int:
        """Number of tokens of questions and answers, with padding."""
        return (TextPairTask if self.apart else Task).positions(self, batch)

    def predict(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Number of predicted tokens and their summed loss in nats of each row: [B, 2]."""
        return (
            TextPairTask.predict(self, outputs, batch)
            if self.apart
            else super().predict(outputs, batch)
        )

    def prompts(self, processor: ImageTextProcessor, rows: Columns, /) -> list[Sequence[int]]:
        """The tokens and images of each conversation, which the model continues."""
        pairs = zip(rows["messages"], rows["images"], strict=True)
        return [prompt_of(processor, messages, images) for messages, images in pairs]

    def prompt(self, processor: ImageTextProcessor, row: Row, /) -> Sequence[int]:
        """The prompt of the last answer of an encoded row, with its images."""
        images = [source for source, _ in json.loads(row["images"])[: row["_prompt_images"]]]
        return ImagePrompt(tuple(row["_prompt"]), row["_prompt_text"], tuple(images), processor)


def chat_about_image(text: str) -> list[Message]:
    """A conversation with an image, whose question and answer are one text."""
    answer = {"role": "assistant", "content": text}
    question = {"role": "user", "content": text}
    return [with_parts(question, [{"type": IMAGE}, {"type": "text", "text": text}]), answer]


@dataclass(frozen=True)
class BatchOfConversations:
    """A collate function for encoded conversations with images."""

    processor: ImageTextProcessor
    multiple: int
    apart: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """The inputs of a model and `labels`, [B, T]; images as the processor puts them.

        Labels of a decoder of its own, `apart`, are [B, T of the longest answer].
        """
        images = [[*decoded(row["images"])] for row in rows]
        texts = [row["text"] for row in rows]
        inputs = training_inputs(self.processor, texts, images, self.multiple)
        ids = inputs["input_ids"]
        labels = np.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            length = len(row["input_ids"])
            if ids[i, :length].tolist() != row["input_ids"]:
                raise InputError(
                    f"{type(self.processor).__name__} gives other tokens to the images of "
                    f"{row['text'][:60]!r} in a batch than to them alone"
                )
            if not self.apart:
                labels[i, :length] = row["labels"]
        if self.apart:
            labels = Pad(IGNORED, self.multiple).stack(rows, "labels", IGNORED).numpy()
        arrays = {**inputs, "labels": labels}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def decoded(images: str) -> Iterator["Image"]:
    """Yield the images of an encoded row, which must be as they were when it was encoded."""
    for source, digest in json.loads(images):
        yield image_of(source, digest)


def encoder_of(
    processor: ImageTextProcessor, messages: list[Message], images: Sequence[ImageSource]
) -> ConversationEncoder:
    """The encoder of a conversation, whose images are decoded.

    Raises:
        InputError: an image is damaged; the message has the beginning of the conversation.
    """
    try:
        return ConversationEncoder(processor, images)
    except InputError as error:
        raise InputError(f"{excerpt(messages)}: {error}") from error


def prompt_of(
    processor: ImageTextProcessor, messages: list[Message], images: Sequence[ImageSource]
) -> ImagePrompt:
    """The prompt of a conversation, up to the header of the assistant's next turn.

    Raises:
        InputError: the template or the processor refuses it, or an image is damaged.
    """
    encoder = encoder_of(processor, messages, images)
    ids = question(encoder, messages)
    chat = unpacked(messages)
    text, _ = encoder.text(chat.turns, **chat.options, add_generation_prompt=True)
    return ImagePrompt(tuple(ids), text, tuple(images), processor)
