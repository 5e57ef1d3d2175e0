"""A chat with a language model: its turns, and the adapter that answers."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Event

from petl.data.tasks import Message
from petl.errors import InputError
from petl.generation.inference.language_model import LanguageModel, message
from petl.generation.inference.sampling import Sample, Sampling


@dataclass
class ChatSession:
    """The state of a chat.

    Attributes:
        adapter: the name of the adapter that answers, for `LanguageModel.using`.
        system: the system prompt; None: that of the model's training.
        turns: questions and answers so far; always empty for a model that reads plain text, which
            answers each text by itself.
        asked: the last text that such a model has answered; empty: none.
    """

    model: LanguageModel
    sampling: Sampling
    adapter: str
    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    asked: str = ""

    def ask(self, text: str, write: Callable[[str], object], stop: Event | None = None) -> Sample:
        """Answer a text, and keep both as turns.

        Args:
            write: gets the answer in pieces.
            stop: ends the answer once it is set.

        Raises:
            InputError: the model does not take the text; the turns are as before.
        """
        question = message("user", text)
        prompt = self.model.encode([*self.turns, question], self.system)
        with self.model.using(self.adapter):
            (answer,) = self.model.answer([prompt], self.sampling, write=write, stop=stop)
        # after the answer: an error in it leaves the turns as they were
        if self.model.is_chat:
            self.turns += [question, message("assistant", answer.text)]
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
        return question["content"]

    def forget(self) -> None:
        """Remove all questions and answers."""
        self.turns.clear()
        self.asked = ""
