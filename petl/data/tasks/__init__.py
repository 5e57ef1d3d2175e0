"""Tasks: how rows are encoded, batched and scored, and which model head they need.

A task needs torch, and is imported when it is chosen. What its rows are called is known before.
"""

import math
from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

from petl.system.values import Rule, one_of, real

# by `data.task`, "module:class", imported when it is chosen
TASKS = {
    "classification": "petl.data.tasks.classification:Classification",
    "multi_label": "petl.data.tasks.multi_label:MultiLabel",
    "regression": "petl.data.tasks.regression:Regression",
    "token_classification": "petl.data.tasks.token_classification:TokenClassification",
    "question_answering": "petl.data.tasks.question_answering:QuestionAnswering",
    "causal_lm": "petl.data.tasks.causal_lm:CausalLM",
    "seq2seq": "petl.data.tasks.seq2seq:Seq2Seq",
    "image_text": "petl.data.tasks.image_text:ImageText",
    "image_classification": "petl.data.tasks.media:ImageClassification",
    "audio_classification": "petl.data.tasks.media:AudioClassification",
    "retrieval": "petl.data.tasks.retrieval:Retrieval",
    "reranking": "petl.data.tasks.retrieval.reranking:Reranking",
    "multitask_classification": "petl.data.tasks.multitask:MultitaskClassification",
    "dpo": "petl.data.tasks.preferences.pairs:DPO",
    "orpo": "petl.data.tasks.preferences.pairs:ORPO",
    "kto": "petl.data.tasks.preferences.rated:KTO",
    "reward": "petl.data.tasks.preferences.reward:Reward",
    "grpo": "petl.data.tasks.preferences.grpo:GRPO",
}

# of a conversation: `role`, `content`, and `more`, the JSON text of what only some messages have
Message = dict[str, Any]
TOOLS = "(tools)"  # role of a first message whose content are the functions, as JSON text
COLUMN, IDS = "task", "task_ids"  # of rows of several tasks, of encoded rows and batches
SEPARATOR = "/"  # between task and label in the name of a class
SET = "_set"  # column of the rows of a mixture: the number of their set
# of `data.labels` and of tasks
CLASSES = Rule(
    "a list of at least two distinct classes", lambda names: len(names) == len({*names}) > 1
)

# of `data.new_tokens`, of tasks and of `petl.add_tokens`
NEW_TOKENS = Rule(
    "a list of distinct texts that are not blank",
    lambda tokens: 0 < len(tokens) == len({*tokens}) and all(token.strip() for token in tokens),
)
NO_TEXT = ("image_classification", "audio_classification")  # tasks without a tokenizer
# of `data.pooling` and `data.dims`, and of retrieval
POOLING = one_of("mean", "cls", "last")
DIMS = Rule(
    "falling widths, such as [384, 128, 32]",
    lambda dims: bool(dims) and dims == sorted({*dims}, reverse=True) and dims[-1] > 0,
)

# of losses of retrieval
ABOVE_0, MARGIN = real(0, above=True), real(-2, math.inf)
DISTANCE = one_of("euclidean", "cosine")

# of `data.threshold` and of multi-label tasks, which count probabilities in such steps
THRESHOLD = Rule(
    "a multiple of 0.01 from 0.01 to 0.99",
    lambda value: 0 < value < 1 and abs(100 * value - round(100 * value)) < 1e-9,
)


def task_class(name: str) -> type[Any]:
    """Return the class of a task in `TASKS`."""
    return resolve_name(TASKS[name])


def later(name: str, **fields: object) -> Callable[[], Any]:
    """Return the function that builds a task with these fields, and imports torch."""
    return lambda: task_class(name)(**fields)
