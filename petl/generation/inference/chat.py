"""A chat with a language model: its turns, and the adapter that answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event

from petl.data.conversations import IMAGE, parts_of
from petl.data.tasks import Message
from petl.data.tasks.image_text.images import image_of
from petl.data.tasks.image_text.prompt import Conversation
from petl.data.validation import Row
from petl.errors import InputError
from petl.generation.inference.language_model import LanguageModel, message
from petl.generation.inference.sampling import Sample, Sampling
from petl.system.files.paths import file_of


@dataclass
class ChatSession:
    """The state of a chat.

    Attributes:
        adapter: the name of the adapter that answers, for `LanguageModel.using`.
        system: the system prompt; None: that of the model's training.
        turns: questions and answers so far; always empty for a model that reads plain text, which
            answers each text by itself.
        asked: the last text that such a model has answered; empty: none.
        images: of the turns, in their order.
        waiting: images that the next question begins with.
        ends: how each answer of `turns` ended, see `Sample.finish`.
    """

    model: LanguageModel
    sampling: Sampling
    adapter: str
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    asked: str = ""
    images: list[str] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)

    def show(self, path: str) -> None:
        """Let the next question begin with an image.

        Raises:
            InputError: it cannot be read, or the model reads texts alone.
        """
        if self.model.processor is None or not self.model.is_chat:
            raise InputError(f"{self.model.name} reads texts alone, without images")
        file = str(file_of("image", path).resolve())
        image_of(file)  # each answer reads it again
        self.waiting.append(file)

    def row(self) -> Row:
        """The chat as a row to train on."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        images, turns = iter(self.images), []
        for turn in self.turns:
            parts = [
                {"type": "image_url", "image_url": {"url": next(images)}}
                if part["type"] == IMAGE
                else part
                for part in parts_of(turn)
            ]
            content = parts if "more" in turn else turn["content"]
            turns.append({"role": turn["role"], "content": content})
        return {"messages": [*system, *turns]}

    def ask(self, text: str, write: Callable[[str], object], stop: Event | None = None) -> Sample:
        """Answer a text, and keep both as turns.

        Args:
            write: gets the answer in pieces.
            stop: ends the answer once it is set.

        Raises:
            InputError: the model does not take the text; the turns are as before.
        """
        question = message("user", text, len(self.waiting))
        images = [*self.images, *self.waiting]
        asked = Conversation([*self.turns, question], tuple(images))
        prompt = self.model.encode(asked if self.model.is_chat else text, self.system)
        with self.model.using(self.adapter):
            (answer,) = self.model.answer([prompt], self.sampling, write=write, stop=stop)
        # after the answer: an error in it leaves the turns as they were
        if self.model.is_chat:
            self.turns += [question, message("assistant", answer.text)]
            self.images, self.waiting = images, []
            self.ends.append(answer.finish)
        else:  # plain text has one turn only
            self.asked = text
        return answer

    def take_back(self) -> str:
        """Remove the last question with its answer, and return the question.

        Raises:
            InputError: there is none.
        """
        if self.asked:
            return self.asked
        if not self.turns:
            raise InputError(f"there is no question yet to answer with {self.adapter}")
        *self.turns, question, _ = self.turns  # turns come in pairs
        self.ends = self.ends[:-1]
        count = sum(part["type"] == IMAGE for part in parts_of(question))
        start = len(self.images) - count
        self.images, self.waiting = self.images[:start], [*self.images[start:], *self.waiting]
        return question["content"]

    def forget(self) -> None:
        """Remove all questions and answers."""
        self.turns.clear()
        self.images.clear()
        self.waiting.clear()
        self.ends.clear()
        self.asked = ""
