"""Classification of images and of sounds, by the model's own image processor or feature extractor.

All rows of a model have one shape. A processor of images makes it so; where a feature extractor
leaves clips as long as they are, they are filled up to `max_seconds`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Array2D, Array3D, Array4D, Dataset, Features, List, Value
from torch import Tensor
from transformers import (
    AutoFeatureExtractor,
    AutoImageProcessor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
)

from petl.errors import InputError
from petl.tasks.classification import OneClass
from petl.tasks.media_files import grey, picture, wave
from petl.tasks.rows import Columns, Row

Arrays = dict[str, np.ndarray]


@dataclass
class Media(OneClass, ABC):
    """Files (`path`, and `sha256` of what is in them) with the number of their class (`label`)."""

    peft_task_type: ClassVar[str | None] = None
    reads_text: ClassVar[bool] = False
    encoded_at_once: ClassVar[int] = 64

    @abstractmethod
    def largest(self, processor: Any) -> Any:
        """An input as large as they come, with nothing in it."""

    @abstractmethod
    def decode(self, processor: Any, rows: Columns, place: int) -> Any:
        """The input in row `place`."""

    @abstractmethod
    def process(self, processor: Any, given: Any) -> Arrays:
        """What the model reads of one input, by name."""

    def features(self, processor: Any) -> Features:
        made = self.process(processor, self.largest(processor))
        return Features({**{k: feature(v) for k, v in made.items()}, "labels": Value("int64")})

    def encode_rows(self, processor: Any, rows: Columns) -> Columns:
        whole = self.process(processor, self.largest(processor))
        columns: Columns = {name: [] for name in whole}
        for place in range(len(rows["label"])):
            made = self.process(processor, self.decode(processor, rows, place))
            for name, full in whole.items():
                filled = self.fill(made[name], full, processor)
                if filled.shape != full.shape:
                    raise InputError(
                        f"{rows['path'][place]} becomes {name} of shape {list(filled.shape)} and "
                        f"others {list(full.shape)}: the model's {type(processor).__name__} must "
                        "bring all to one size"
                    )
                columns[name].append(filled)
        return {**columns, "labels": rows["label"]}

    def fill(self, made: np.ndarray, full: np.ndarray, processor: Any) -> np.ndarray:
        """`made`, as long as `full` where that can be."""
        return made

    def encode(self, processor: Any, split: Dataset) -> Dataset:
        return super().encode(processor, split).with_format("numpy")

    def lengths(self, rows: Dataset) -> list[int]:
        return [1] * len(rows)

    def whole(self) -> None:
        return None

    def count(self, batch: dict[str, Tensor]) -> int:
        return len(batch["labels"])

    def positions(self, batch: dict[str, Tensor]) -> int:
        return self.count(batch)

    def width(self, batch: dict[str, Tensor]) -> None:
        return None

    def collate(
        self, processor: Any, multiple: int = 1
    ) -> Callable[[Sequence[Row]], dict[str, Tensor]]:
        return batch_of_arrays


@dataclass
class ImageClassification(Media):
    """Images, in files or as `pixels`: rows of grey values from 0 to 255."""

    name: ClassVar[str] = "image_classification"
    unit: ClassVar[str] = "images"

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForImageClassification

    @property
    def processor_class(self) -> type[Any]:
        return AutoImageProcessor

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "pillow": version("pillow")}

    def largest(self, processor: Any) -> Any:
        return grey(np.zeros((48, 64)))  # any will do: the processor sets the size

    def decode(self, processor: Any, rows: Columns, place: int) -> Any:
        return grey(rows["pixels"][place]) if "pixels" in rows else picture(rows["path"][place])

    def process(self, processor: Any, given: Any) -> Arrays:
        return without_batch(processor(given, return_tensors="np"))


@dataclass
class AudioClassification(Media):
    """Sounds, in files; a longer one is cut."""

    name: ClassVar[str] = "audio_classification"
    unit: ClassVar[str] = "clips"

    max_seconds: float = 10.0

    @property
    def auto_class(self) -> type[Any]:
        return AutoModelForAudioClassification

    @property
    def processor_class(self) -> type[Any]:
        return AutoFeatureExtractor

    def settings(self) -> dict[str, Any]:
        return {"task": self.name, "max_seconds": self.max_seconds, "scipy": version("scipy")}

    def largest(self, processor: Any) -> Any:
        return np.zeros(round(self.max_seconds * processor.sampling_rate), np.float32)

    def decode(self, processor: Any, rows: Columns, place: int) -> Any:
        return wave(rows["path"][place], processor.sampling_rate, self.max_seconds)

    def process(self, processor: Any, given: Any) -> Arrays:
        made = processor(given, sampling_rate=processor.sampling_rate, return_tensors="np")
        return without_batch(made)

    def fill(self, made: np.ndarray, full: np.ndarray, processor: Any) -> np.ndarray:
        lacking = len(full) - len(made)
        if lacking <= 0:
            return made[: len(full)]
        value = 0 if made.dtype.kind in "iu" else processor.padding_value  # integers: the mask
        return np.pad(made, [(0, lacking), *[(0, 0)] * (made.ndim - 1)], constant_values=value)


def without_batch(made: Any) -> Arrays:
    """What a processor made of one input, as float32 or int64."""
    arrays = {name: np.asarray(value)[0] for name, value in made.items()}
    return {
        k: v.astype(np.int64 if v.dtype.kind in "iu" else np.float32) for k, v in arrays.items()
    }


def feature(array: np.ndarray) -> Any:
    """The column type of arrays like this one."""
    kind = str(array.dtype)
    if array.ndim == 1:
        return List(Value(kind), length=len(array))
    return {2: Array2D, 3: Array3D, 4: Array4D}[array.ndim](array.shape, kind)


def batch_of_arrays(rows: Sequence[Row]) -> dict[str, Tensor]:
    """Each column [B, ...], `labels` [B]."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
