"""Tasks: how rows are encoded, batched and scored, and which model head they need."""

from petl.data.tasks.base import IGNORED, NON_INPUT_PREFIX, Task
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.classification import Classification
from petl.data.tasks.media import AudioClassification, ImageClassification
from petl.data.tasks.multitask import MultitaskClassification
from petl.data.tasks.question_answering import QuestionAnswering
from petl.data.tasks.regression import Regression
from petl.data.tasks.seq2seq import Seq2Seq
from petl.data.tasks.token_classification import TokenClassification

TASKS: dict[str, type[Task]] = {
    task.name: task
    for task in (
        Classification,
        Regression,
        TokenClassification,
        QuestionAnswering,
        CausalLM,
        Seq2Seq,
        ImageClassification,
        AudioClassification,
        MultitaskClassification,
    )
}

__all__ = [
    "IGNORED",
    "NON_INPUT_PREFIX",
    "TASKS",
    "AudioClassification",
    "CausalLM",
    "Classification",
    "ImageClassification",
    "MultitaskClassification",
    "QuestionAnswering",
    "Regression",
    "Seq2Seq",
    "Task",
    "TokenClassification",
]
