"""Columns of tasks whose model writes: causal language modeling and sequence to sequence."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar

from petl.data.conversations import TurnKeys, turn_with_image, without_last_answer
from petl.data.formats import (
    RATED,
    Format,
    fitting_task,
    formats,
    naming,
    pair_format,
    recognized,
    text_format,
    turns_format,
    with_system,
)
from petl.data.task_columns import AnySourceRows, ColumnSettings, TaskColumns
from petl.data.tasks import Message, later
from petl.data.templates import columns_of, is_template, read_text
from petl.data.validation import LazySourceRows, Row, passage, require
from petl.errors import InputError, choose

if TYPE_CHECKING:
    from petl.data.tasks.base import Task
    from petl.data.tasks.causal_lm import CausalLM

logger = logging.getLogger(__name__)


class AnswerColumns(TaskColumns, ABC):
    """Rows in one of several formats, which is named by a setting or recognized from columns."""

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        self.found: dict[Format, list[str]] = {}  # formats of the rows read so far, their columns
        self.known: dict[tuple[str, ...], Format | None] = {}  # by the columns of a row
        # settings such as data.messages name columns, and so does data.format: one of the two
        own = self.own_format()
        if own is not None and settings.format is not None:
            raise InputError(
                f"data.format={settings.format} names the columns, and so do other settings "
                f"({', '.join(own.required(labeled=True))}): give one of them"
            )
        if own is None and settings.format is not None:
            own = choose(formats(), settings.format, "data.format")
        self.named = own
        # in the order of preference: the first whose columns are present is taken
        self.formats = (self.named,) if self.named else (self.usual_format(), *self.recognized())

    def own_format(self) -> Format | None:
        """The format that settings of columns describe; None if they are not given.

        Raises:
            InputError: a prompt without an answer, or both them and conversations.
        """
        described, prompt, answer = self.conversations(), self.settings.prompt, self.settings.answer
        if (prompt is None) != (answer is None):
            raise InputError(
                f"data.prompt={prompt} and data.answer={answer}: give both, the columns of "
                "questions and answers, or neither"
            )
        if prompt is None or answer is None:
            return described
        if described is not None:
            messages = self.settings.messages
            column = "data.role" if messages is None else f"data.messages={messages}"
            raise InputError(f"{column} and data.prompt={prompt}: give one of them")
        return pair_format("prompt and answer", prompt, answer)

    @abstractmethod
    def usual_format(self) -> Format:
        """The format that is recognized before the others."""

    def recognized(self) -> tuple[Format, ...]:
        """The formats that are recognized after `usual_format`."""
        return recognized()

    def conversations(self) -> Format | None:
        """Conversations in a column, or with turns, that settings describe; None: none do."""
        settings = self.settings
        given = (settings.role, settings.content, settings.roles)
        if settings.messages is None and given == (None, None, None):
            return None
        keys = TurnKeys.of(*given)
        return turns_format("messages", settings.messages or "messages", "system", keys=keys)

    def choose(self, present: Iterable[str], origin: str) -> list[str]:
        """Return the columns of the format that rows with these columns have.

        Raises:
            InputError: they have none, or one that is only read where `data.format` names it.
        """
        names = tuple(present)
        chosen = self.format_of(names)
        if chosen is None:
            chosen = self.formats[0]
            needed = chosen.required(labeled=self.labeled)
            require(needed, names, origin, self.hint(needed, names))  # one is missing
        columns = chosen.required(labeled=self.labeled)
        columns += [name for name in chosen.optional if name in names]
        # checks those of data.system, which no format knows, and removes repeats
        columns = require([*columns, *self.system], names, origin)
        # once a format, not once a row: rows of several files may differ
        if chosen not in self.found:
            self.refuse(chosen, names, origin)
            self.check_found(chosen, origin)
            self.found[chosen] = columns
            if not self.named:
                self.announce(chosen, names, origin)
        return columns

    @property
    def system(self) -> list[str]:
        """The columns of `data.system`."""
        template = self.settings.system
        return columns_of(template) if template and is_template(template) else []

    def format_of(self, names: tuple[str, ...]) -> Format | None:
        """The format of rows with these columns; None if they have none."""
        if names not in self.known:
            self.known[names] = next(iter(self.fitting(names)), None)
        return self.known[names]

    def fitting(self, names: Collection[str]) -> list[Format]:
        """The formats whose columns are among these, in the order of preference."""
        return [f for f in self.formats if {*f.required(labeled=self.labeled)} <= {*names}]

    def refuse(self, chosen: Format, names: Collection[str], origin: str) -> None:
        """Raise InputError if rows have a format that is only read where `data.format` names it."""
        # KTO data: the label says if a completion is good, and bad ones must not be learned
        is_rated = chosen.name == "prompt_completion" and "label" in names
        refusal = RATED if is_rated else chosen.refusal
        # to predict, only the prompt is read, whatever the answers are for
        if refusal and self.labeled and not self.named:
            raise InputError(f"{origin} {refusal}")

    def announce(self, chosen: Format, names: Collection[str], origin: str) -> None:
        """Log which format was recognized, and which other would fit."""
        others = self.fitting(names)[1:]
        logger.info(
            "%s is read as %s%s",
            # origin is "FILE, row N"; the format is one of the file
            origin.partition(", ")[0],
            chosen.described(names),
            f"; data.format={others[0].name} reads its other columns" if others else "",
        )

    def hint(self, needed: Collection[str], names: Sequence[str]) -> str:
        """The end of the message about rows without the columns of any format."""
        hint = fitting_task(names, self.settings.task)
        if self.settings.format:
            others = [f for f in recognized() if {*f.required(labeled=self.labeled)} <= {*names}]
            hint = f".\nIt fits data.format={others[0].name}" if others else hint
        elif hint is None and not self.named:
            hint = f".\nNo known format fits: name the columns, {naming(names)}"
        missing = next(name for name in needed if name not in names)
        return hint or self.naming(missing, names)

    def check_found(self, chosen: Format, origin: str) -> None:
        """Raise InputError if a format does not suit the settings or the formats before it."""

    def look(self, rows: AnySourceRows) -> None:
        """Recognize the format of a stream by its first row; other rows are read already."""
        if not self.found and isinstance(rows, LazySourceRows):
            # a stream can be read again from its beginning, so this row is not lost
            next(rows.read(self.choose))

    def described(self) -> str:
        """The formats of the rows read so far."""
        return ", ".join(found.described(columns) for found, columns in self.found.items())

    def converter(self, row: Row) -> Callable[[Row], list[Message]] | None:
        """The function that makes the messages of a row; None if its text is plain."""
        chosen = self.format_of(tuple(row))
        assert chosen is not None, "choose() has refused rows without a format"
        return chosen.convert

    def messages(self, row: Row, convert: Callable[[Row], list[Message]]) -> list[Message]:
        """The messages of a row, without its last answer if rows are not labeled."""
        found = convert(row)
        place = turn_with_image(found)
        if place and not self.reads_images:
            raise ValueError(f"has an image in turn {place}: data.task=image_text reads those")
        found = with_system(found, self.settings.system, row)
        if self.labeled:
            if all(message["role"] != "assistant" for message in found):
                raise ValueError("has no turn of the assistant, from which to learn")
            return found
        asked = without_last_answer(found)
        if not asked:
            raise ValueError("has no question before its answer")
        return asked


class CausalLMColumns(AnswerColumns):
    """Texts, or conversations in one of the formats of `petl.data.formats`."""

    own_settings: ClassVar[tuple[str, ...]] = (
        *("text", "messages", "role", "content", "roles", "prompt", "answer", "format", "system"),
        *("pack", "generate"),
    )

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        super().__init__(settings, labeled=labeled)
        if self.named:
            # a named format is known before any row: settings that contradict it fail at once
            self.check_found(self.named, "the file")

    def restrict(self, task: "CausalLM") -> None:
        """Read rows of one kind only: the conversations or the plain texts of a trained task.

        Raises:
            InputError: settings name columns of the other kind.
        """
        self.formats = tuple(f for f in self.formats if (f.convert is not None) == task.chat)
        if not self.formats:
            assert self.named is not None, "each kind has a format that is recognized"
            own = ("data.messages, or data.prompt and data.answer", "conversations")
            name, kind = own if task.chat else ("data.text", "plain texts")
            raise InputError(
                f"the settings of columns are for {self.named.name} rows, but the adapter was "
                f"trained on {kind}: give {name}"
            )

    def own_format(self) -> Format | None:
        """Conversations, prompts with answers, or texts in columns that settings name."""
        own, text = super().own_format(), self.settings.text
        # "text" is the default, which does not show that the user named it
        return text_format(text) if own is None and text != "text" else own

    def usual_format(self) -> Format:
        """Plain text."""
        return formats()["text"]

    def check_found(self, chosen: Format, origin: str) -> None:
        """Raise InputError if texts and conversations are mixed, or a setting is of the other."""
        settings, chat = self.settings, chosen.convert is not None
        # the loss of texts is on all tokens, that of conversations on answers: one task has one
        if any((found.convert is not None) != chat for found in self.found):
            names = " and ".join(found.name for found in self.found)
            raise InputError(
                f"{origin} makes the rows a mixture of {names}: give one of both kinds"
            )
        if settings.pack and chat:
            raise InputError(
                f"data.pack=true is for plain text, but rows are conversations ({chosen.name}): "
                "set data.pack=false"
            )
        if not chat and settings.generate is not None:
            raise InputError(
                f"data.generate={settings.generate} is for conversations, which have prompts, but "
                f"rows are plain text ({', '.join(chosen.asked)}): see data.format"
            )
        if not chat and settings.system is not None:
            raise InputError(
                "data.system is for conversations, but rows are plain text "
                f"({', '.join(chosen.asked)}): see data.format"
            )

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build a causal language modeling task."""
        self.look(rows)
        settings = self.settings
        return later(
            "causal_lm",
            max_length=settings.max_length,
            chat=any(found.convert is not None for found in self.found),
            pack=settings.pack,
            generate=settings.generate,
        )

    def convert(self, row: Row) -> Row:
        """Column `messages` of conversations, else `text`."""
        convert = self.converter(row)
        if convert is None:
            return {"text": read_text(row, self.settings.text, passage)}
        return {"messages": self.messages(row, convert)}


class Seq2SeqColumns(AnswerColumns):
    """Texts with target texts, or one of the formats of `petl.data.formats` with one answer."""

    own_settings: ClassVar[tuple[str, ...]] = (
        *("text", "target", "format", "prefix", "max_target_length", "generate"),
    )

    def __init__(self, settings: ColumnSettings, *, labeled: bool = True) -> None:
        if settings.format == "text":
            raise InputError(
                f"data.format={settings.format} is for data.task=causal_lm: it has no targets"
            )
        super().__init__(settings, labeled=labeled)

    def own_format(self) -> Format | None:
        """Texts and targets in columns that settings name."""
        settings = self.settings
        given = (settings.text, settings.target)
        return pair_format("text and target", *given) if given != ("text", "target") else None

    def usual_format(self) -> Format:
        """Columns text and target."""
        return pair_format("text and target", self.settings.text, self.settings.target)

    def task(self, rows: AnySourceRows) -> "Callable[[], Task]":
        """Build a sequence-to-sequence task."""
        self.look(rows)
        settings = self.settings
        return later(
            "seq2seq",
            max_length=settings.max_length,
            max_target_length=settings.max_target_length,
            prefix=settings.prefix,
            generate=settings.generate,
        )

    def convert(self, row: Row) -> Row:
        """Columns `text` and `target`, the latter of labeled rows."""
        convert = self.converter(row)
        assert convert is not None, "data.format=text is refused for this task"
        messages = self.messages(row, convert)
        expected = ["user", "assistant"] if self.labeled else ["user"]
        roles = [message["role"] for message in messages]
        # "more" has the rest of a message as JSON; a tool call has no text to learn
        if roles != expected or any("tool_calls" in m.get("more", "") for m in messages):
            raise ValueError(
                f"has the turns {', '.join(roles)}; an encoder-decoder reads one question and one "
                "answer (conversations are for data.task=causal_lm)"
            )
        names = ("text", "target")
        # not strict: without labels there is one message, and no target
        return {n: m["content"] for n, m in zip(names, messages, strict=False)}
