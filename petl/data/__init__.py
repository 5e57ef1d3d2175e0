"""Data sets: `read_data(cfg.data)` reads and checks the rows before any model is loaded."""

from petl.data.base import SOURCES, RawData, as_dataset, data_source, read_data
from petl.data.bucketing import BucketBatchSampler
from petl.data.bundled import Digits, Hamlet, Reasoning, WordNet
from petl.data.files import Files
from petl.data.folders import AudioFolder, ImageFolder, Speech
from petl.data.hub import Hub
from petl.data.task_sets import TaskSets

SOURCES |= {
    "wordnet": WordNet,
    "hamlet": Hamlet,
    "reasoning": Reasoning,
    "files": Files,
    "hub": Hub,
    "image_folder": ImageFolder,
    "audio_folder": AudioFolder,
    "digits": Digits,
    "speech": Speech,
    "tasks": TaskSets,
}


__all__ = [
    "SOURCES",
    "BucketBatchSampler",
    "RawData",
    "as_dataset",
    "data_source",
    "read_data",
]
