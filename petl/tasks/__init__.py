"""Task families: what the rows mean to the model, how they become tensors, how they are scored."""

from petl.tasks.base import IGNORED, Task
from petl.tasks.causal_lm import CausalLM
from petl.tasks.classification import Classification
from petl.tasks.media import AudioClassification, ImageClassification

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Classification, CausalLM, ImageClassification, AudioClassification)
}

__all__ = [
    "IGNORED",
    "TASKS",
    "AudioClassification",
    "CausalLM",
    "Classification",
    "ImageClassification",
    "Task",
]
