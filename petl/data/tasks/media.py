"""Image and audio classification, with the model's image processor or feature extractor.

All rows of a model have one shape: an image processor resizes images, and clips are padded to
`max_seconds` if the feature extractor does not do so.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

import numpy as np
import torch
from datasets import Array2D, Array3D, Array4D, Dataset, Features, List, Value
from numpy.typing import ArrayLike
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
)

from petl.data.tasks.base import (
    AutoModelClass,
    AutoProcessorClass,
    Batch,
    Collate,
    Columns,
    Fields,
    P,
    Row,
)
from petl.data.tasks.classification import SingleLabelTask
from petl.data.tasks.media_files import Wave, gray_image, read_audio, read_image
from petl.errors import InputError
from petl.system.values import field, real

if TYPE_CHECKING:
    from PIL.Image import Image

FAULTS = 8  # files that a message names
MIN_SECONDS = 0.05  # of a clip: two windows of a spectrogram
CLIP = real(MIN_SECONDS)
Arrays = dict[str, np.ndarray]
M = TypeVar("M")  # what a file is decoded to


class ImageProcessor(Protocol):
    """What image classification uses of the image processors of transformers."""

    def __call__(self, images: object, *, return_tensors: str) -> Mapping[str, ArrayLike]:
        """The model's inputs for a batch of one image."""


class SoundProcessor(Protocol):
    """What audio classification uses of the feature extractors of transformers."""

    sampling_rate: int
    padding_value: float

    def __call__(
        self, raw_speech: Wave, *, sampling_rate: int, return_tensors: str
    ) -> Mapping[str, ArrayLike]:
        """The model's inputs for a batch of one clip."""


@dataclass
class MediaTask(SingleLabelTask[P], ABC, Generic[P, M]):
    """Files (`path`, and `sha256` of their content) with the number of their class (`label`)."""

    peft_task_type: ClassVar[str | None] = None
    encoded_by: ClassVar[tuple[str, ...]] = ()
    reads_text: ClassVar[bool] = False
    encoded_at_once: ClassVar[int] = 64  # images take more memory than tokens; assumption
    shown: ClassVar[tuple[str, ...]] = ("path",)

    @abstractmethod
    def largest(self, processor: P) -> M:
        """An empty input of the maximum size."""

    @abstractmethod
    def decode(self, processor: P, rows: Columns, index: int) -> M:
        """Decode the file of row `index`."""

    @abstractmethod
    def process(self, processor: P, media: M) -> Arrays:
        """The model's inputs for one decoded file, by name."""

    def features(self, processor: P, /) -> Features:
        """Types and shapes, from the processor's output for the largest input."""
        arrays = self.process(processor, self.largest(processor))
        return Features({**{k: feature(v) for k, v in arrays.items()}, "labels": Value("int64")})

    def encode_rows(self, processor: P, rows: Columns, /) -> Columns:
        """Decode and process files; all rows get the shapes of the largest input.

        Raises:
            InputError: a file cannot be read, or its shape differs.
        """
        # the shapes that all rows must have
        largest = self.process(processor, self.largest(processor))
        columns: Columns = {name: [] for name in largest}
        for index in range(len(next(iter(rows.values())))):
            arrays = self.process(processor, self.decode(processor, rows, index))
            for name, full in largest.items():
                padded = self.pad(arrays[name], full, processor)
                if padded.shape != full.shape:
                    raise InputError(
                        f"{rows['path'][index]} becomes {name} of shape {list(padded.shape)}, but "
                        f"others have {list(full.shape)}: the model's {type(processor).__name__} "
                        "must resize all to one shape"
                    )
                columns[name].append(padded)
        return columns | ({"labels": rows["label"]} if "label" in rows else {})

    def pad(self, array: np.ndarray, full: np.ndarray, processor: P) -> np.ndarray:
        """Pad or truncate `array` to the length of `full`, if the task can."""
        return array

    def random_rows(self, processor: P, count: int, draw: torch.Generator) -> dict[str, Tensor]:
        """Model inputs of noise, [count, ...] each; masks are those of the largest input."""
        largest = self.process(processor, self.largest(processor))
        full = {name: torch.from_numpy(array) for name, array in largest.items()}
        return {
            name: torch.randn(count, *array.shape, generator=draw)
            if array.is_floating_point()
            else array.expand(count, *array.shape)
            for name, array in full.items()
        }

    def encode(self, processor: P, split: Dataset, /) -> Dataset:
        """Encode rows as in `Task`; they are read as numpy arrays.

        Raises:
            InputError: files cannot be read; the message names several of them.
        """
        try:
            return super().encode(processor, split).with_format("numpy")
        except InputError as error:
            faults = self.faults(processor, split) if "path" in split.column_names else []
            if not faults:
                raise
            more = f"\n  and {len(faults) - FAULTS} more" if len(faults) > FAULTS else ""
            listed = "".join(f"\n  {fault}" for fault in faults[:FAULTS])
            raise InputError(
                f"{len(faults)} of {len(split)} files cannot be used: repair or remove "
                f"them{listed}{more}"
            ) from error

    def faults(self, processor: P, split: Dataset) -> list[str]:
        """What is wrong with each file that cannot be decoded."""
        rows, found = {"path": [*split["path"]]}, list[str]()
        for index, path in enumerate(rows["path"]):
            try:
                self.decode(processor, rows, index)
            except InputError as error:
                # not of a package that is missing
                found += [str(error)] if str(error).startswith(path) else []
        return found

    def lengths(self, rows: Dataset) -> list[int]:
        """1 for every row: all have one shape."""
        return [1] * len(rows)

    def untruncated(self) -> None:
        """None: the task shows no tokens."""
        return

    def count(self, batch: Batch) -> int:
        """Number of rows."""
        return len(batch["labels"])

    def positions(self, batch: Batch) -> int:
        """Number of rows: there is no padding between rows."""
        return self.count(batch)

    def width(self, batch: Batch) -> None:
        """None: rows have no tokens."""
        return

    def collate(self, processor: P, /, multiple: int = 1) -> Collate:
        """A collate function that stacks arrays."""
        return batch_of_arrays


@dataclass
class ImageClassification(MediaTask[ImageProcessor, "Image"]):
    """Images in files, or as `pixels`: rows of gray levels from 0 to 255."""

    name: ClassVar[str] = "image_classification"
    unit: ClassVar[str] = "images"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForImageClassification
    processor_class: ClassVar[type[AutoProcessorClass]] = AutoImageProcessor

    def settings(self) -> Fields:
        """The task and the version of Pillow, which decodes the files."""
        # decoders change between versions of Pillow
        return {**super().settings(), "pillow": version("pillow")}

    def largest(self, processor: ImageProcessor) -> "Image":
        """A black image."""
        return gray_image(np.zeros((48, 64)))  # any size, since the processor resizes it

    def decode(self, processor: ImageProcessor, rows: Columns, index: int) -> "Image":
        """Read the image file, or convert `pixels`."""
        if "pixels" in rows:
            return gray_image(rows["pixels"][index])
        return read_image(rows["path"][index])

    def process(self, processor: ImageProcessor, media: "Image") -> Arrays:
        """Apply the image processor."""
        return without_batch(processor(media, return_tensors="np"))


@dataclass
class AudioClassification(MediaTask[SoundProcessor, Wave]):
    """Audio files; clips longer than `max_seconds` are truncated."""

    name: ClassVar[str] = "audio_classification"
    unit: ClassVar[str] = "clips"
    auto_class: ClassVar[type[AutoModelClass]] = AutoModelForAudioClassification
    processor_class: ClassVar[type[AutoProcessorClass]] = AutoFeatureExtractor
    encoded_by: ClassVar[tuple[str, ...]] = ("max_seconds",)

    max_seconds: float = field(10.0, CLIP)

    def settings(self) -> Fields:
        """The task, its maximum duration, and the version of SciPy, which resamples."""
        return {**super().settings(), "scipy": version("scipy")}

    def largest(self, processor: SoundProcessor) -> Wave:
        """Silence of `max_seconds`."""
        # the duration decides the size of the spectrogram
        return np.zeros(round(self.max_seconds * processor.sampling_rate), np.float32)

    def decode(self, processor: SoundProcessor, rows: Columns, index: int) -> Wave:
        """Read the audio file at the model's sampling rate."""
        wave = read_audio(rows["path"][index], processor.sampling_rate, self.max_seconds)
        # some extractors of spectrograms fail on less than a window
        least = round(MIN_SECONDS * processor.sampling_rate)
        return np.pad(wave, (0, max(0, least - len(wave))))

    def process(self, processor: SoundProcessor, media: Wave) -> Arrays:
        """Apply the feature extractor."""
        inputs = processor(media, sampling_rate=processor.sampling_rate, return_tensors="np")
        return without_batch(inputs)

    def pad(self, array: np.ndarray, full: np.ndarray, processor: SoundProcessor) -> np.ndarray:
        """Pad or truncate the time axis, the first."""
        missing = len(full) - len(array)
        if missing <= 0:
            return array[: len(full)]
        # integers are the attention mask, floats the features
        value = 0 if array.dtype.kind in "iu" else processor.padding_value
        return np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)], constant_values=value)


def without_batch(inputs: Mapping[str, ArrayLike]) -> Arrays:
    """Remove the batch dimension of a processor's output; float32 or int64."""
    # a processor always returns a batch, here of one input
    arrays = {name: np.asarray(value)[0] for name, value in inputs.items()}
    return {
        k: v.astype(np.int64 if v.dtype.kind in "iu" else np.float32) for k, v in arrays.items()
    }


def feature(array: np.ndarray) -> List | Array2D | Array3D | Array4D:
    """The `datasets` type of a column of arrays with this shape and dtype."""
    dtype = str(array.dtype)
    if array.ndim == 1:
        return List(Value(dtype), length=len(array))
    # `datasets` has an array type for each number of dimensions
    return {2: Array2D, 3: Array3D, 4: Array4D}[array.ndim](array.shape, dtype)


def batch_of_arrays(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Collate rows: each column [B, ...], `labels` [B]."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
