"""Prompts of a file, and their answers in the order of the file."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from petl.data.delimited import lines_of
from petl.data.inputs import read_inputs
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.image_text import ImageText
from petl.data.tasks.image_text.prompt import Conversation
from petl.data.tasks.seq2seq import Seq2Seq
from petl.data.validation import Row
from petl.efficiency.drafting.engine import Stats
from petl.errors import InputError
from petl.generation.inference.language_model import LanguageModel, Prompt
from petl.generation.inference.sampling import Sample, Sampling
from petl.system.files.paths import file_of

TEXT = ".txt"  # a file with a prompt on each line
BATCHES = 16  # of which the prompts are sorted by length together; assumption: little padding


@dataclass(frozen=True)
class Question:
    """A prompt, and the row that it is from with all of its columns."""

    row: Row
    prompt: Prompt


def read_prompts(
    file: str, model: LanguageModel, *, system: str | None = None
) -> Iterator[Question]:
    """Yield the prompts of a file: lines of text, or rows as the model's run has learned from.

    Args:
        system: replaces the system prompt that the settings of the run give to rows without one.

    Raises:
        InputError: the file or a row is not valid, when it is reached.
    """
    if file.lower().endswith(TEXT):
        yield from lines(file)
        return
    # nothing is truncated here
    of_texts = Seq2Seq if model.is_encoder_decoder else CausalLM
    task = (of_texts if model.processor is None else ImageText)(max_length=1)
    # no system prompt from the columns: `encode` adds the one that is given
    columns = {**model.columns, "system": None} if system is not None else model.columns
    for row, read in read_inputs([file], task, columns, any_kind=True, setting="--file"):
        yield Question(row, prompt_in(read))


def prompt_in(row: Row) -> Prompt:
    """The prompt of a row of a task that writes."""
    if "images" in row:
        return Conversation(row["messages"], tuple(row["images"]))
    return row["messages"] if "messages" in row else row["text"]


def lines(file: str) -> Iterator[Question]:
    """Yield the lines of a text file that are not empty."""
    path = file_of("--file", file)
    found = False
    with lines_of(path, newline="\n") as opened:  # a carriage return alone ends no line
        for line in opened:
            text = line.removesuffix("\n").removesuffix("\r")
            if text.strip():
                found = True
                yield Question({"prompt": text}, text)
    if not found:
        raise InputError(f"--file={file} has no prompts")


def check_prompts(
    model: LanguageModel, questions: Iterable[Question], system: str | None = None
) -> None:
    """Raise InputError, with its number, for the first prompt that the model cannot answer.

    Args:
        system: as of `LanguageModel.encode`.
    """
    for number, question in enumerate(questions, start=1):
        ids = model.encode(question.prompt, system)
        try:
            model.room([ids])
        except InputError as error:
            raise InputError(f"prompt {number:,}: {error}") from error


def answered(  # noqa: PLR0913 - all by name
    model: LanguageModel,
    questions: Iterable[Question],
    sampling: Sampling,
    *,
    names: Sequence[str],
    system: str | None = None,
    batch_size: int = 8,
    stats: Stats | None = None,
    count: Callable[[int], object] = lambda number: None,
) -> Iterator[tuple[Question, dict[str, Sample]]]:
    """Yield each question with its answers by the name of the adapter, in order.

    Only a part of the questions is in memory at a time.

    Args:
        names: of the adapters that answer.
        system: as of `LanguageModel.encode`.
        batch_size: prompts that are answered together; with 1, they are answered with drafts.
        stats: as of `LanguageModel.answer`.
        count: called with the number of answers after each batch.
    """
    pending = iter(questions)
    while part := list(islice(pending, BATCHES * batch_size)):
        prompts = [model.encode(question.prompt, system) for question in part]
        # prompts of similar length, the longest first: little padding, and memory is short early
        order = sorted(range(len(part)), key=lambda i: -len(prompts[i]))
        answers: list[dict[str, Sample]] = [{} for _ in part]
        for name in names:
            with model.using(name):  # one switch for many batches
                for start in range(0, len(order), batch_size):
                    chosen = order[start : start + batch_size]
                    chosen_prompts = [prompts[i] for i in chosen]
                    found = model.answer(chosen_prompts, sampling, stats=stats)
                    for i, answer in zip(chosen, found, strict=True):
                        answers[i][name] = answer
                    count(len(chosen))
        yield from zip(part, answers, strict=True)
