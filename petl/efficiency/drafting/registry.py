"""The registry of drafters, and what a drafter is: a guess of the next tokens, to be verified.

A drafter is no PEFT tuner: it stands beside any adapted model, has none of its parameters, and is
never in its state dict. Shapes: N nodes of a pass (the root, then the drafts), H width, V tokens of
the vocabulary, T tokens of answers, P positions in them.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from petl.core.parameters import check_module
from petl.core.types import CausalModel, Fields, Settings, base_of
from petl.efficiency.drafting.costs import Costs
from petl.efficiency.drafting.pairs import vocabulary_size
from petl.errors import InputError, UnknownNameError, UnsupportedError, choose, did_you_mean
from petl.system.values import Rule, integer

DrafterClass = TypeVar("DrafterClass", bound=type["Drafter"])


@dataclass(frozen=True)
class Needs:
    """What a drafter reads of the model, besides tokens.

    Attributes:
        last: the output of the final norm at each node.
        prompt: the states of the prompt's tokens, too.
        logits: the logits of each node.
        encoder: the tokens that the encoder of an encoder-decoder has read.
    """

    last: bool = False
    prompt: bool = False
    logits: bool = False
    encoder: bool = False


class Root(NamedTuple):
    """Where drafts begin.

    Attributes:
        ids: all tokens, of which the last is the root; not to be changed.
        state: [H], the output of the final norm that chose the root; None unless `Needs.last`.
    """

    ids: Sequence[int]
    state: Tensor | None = None


class Draft(NamedTuple):
    """Guessed tokens as a tree.

    Attributes:
        tokens: u_1 to u_n, long [n]; on the CPU, reading them waits for no device.
        parents: of each, long [n]: 0 is the root, i is u_i.
        probabilities: of each, if its parent is right, float [n]; None if not known.
    """

    tokens: Tensor
    parents: Tensor
    probabilities: Tensor | None = None


class PassOutput(NamedTuple):
    """What a pass has computed, without nodes that only pad it.

    Attributes:
        tokens: of all nodes, the root first, long [N], on the CPU.
        parents: of the drafts, long [N - 1], on the CPU.
        logits: [N, V]; None unless `Needs.logits`.
        states: outputs of the final norm, [N, H]; None unless `Needs.last`.
        path: numbers of the accepted nodes, 0 first.
    """

    tokens: Tensor
    parents: Tensor
    logits: Tensor | None
    states: Tensor | None
    path: list[int]


@dataclass(frozen=True)
class DraftAnswers:
    """Rows of a prompt and its answer, one behind the other.

    Attributes:
        ids: tokens of all rows, long [T].
        states: outputs of the final norm at each token, which choose the next one, 16 bits [T, H].
        lengths: tokens of each row.
        starts: tokens of each row's prompt.
    """

    ids: Tensor
    states: Tensor
    lengths: tuple[int, ...]
    starts: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def offsets(self) -> list[int]:
        """Where each row begins, and T at the end."""
        found = [0]
        for length in self.lengths:
            found.append(found[-1] + length)
        return found

    @cached_property
    def ends(self) -> Tensor:
        """The end of the row that each token is in, long [T]."""
        ends = [
            torch.full((n,), end) for n, end in zip(self.lengths, self.offsets[1:], strict=True)
        ]
        return torch.cat(ends).to(self.ids.device)

    @cached_property
    def positions(self) -> Tensor:
        """Where a token of an answer was chosen that another one follows, long [P]."""
        spans = zip(self.offsets, self.starts, self.offsets[1:], strict=False)
        found = [torch.arange(first + start - 1, end - 2) for first, start, end in spans]
        return torch.cat(found).to(self.ids.device)

    @property
    def counts(self) -> list[int]:
        """Positions of each row."""
        return [max(0, n - start - 1) for n, start in zip(self.lengths, self.starts, strict=True)]

    def row(self, i: int) -> slice:
        """Return where row `i` is."""
        return slice(self.offsets[i], self.offsets[i + 1])

    def answer(self, i: int) -> Tensor:
        """Return the tokens that the model wrote in row `i`."""
        return self.ids[self.row(i)][self.starts[i] :]

    def rows(self, numbers: Sequence[int]) -> "DraftAnswers":
        """Return some of the rows."""
        return DraftAnswers(
            torch.cat([self.ids[self.row(i)] for i in numbers]),
            torch.cat([self.states[self.row(i)] for i in numbers]),
            tuple(self.lengths[i] for i in numbers),
            tuple(self.starts[i] for i in numbers),
        )

    def to(self, device: torch.device) -> "DraftAnswers":
        """Return them on a device."""
        return replace(self, ids=self.ids.to(device), states=self.states.to(device))


class DrafterConfig(TypedDict):
    """The content of drafter_config.json.

    Attributes:
        name: in the registry.
        fields: of the drafter.
        vocabulary: number of tokens; 0 if any will do.
        hashes: of base model, adapter and tokenizer, by these names, as far as they are known.
        frequencies: rank frequencies by depth, then rank.
        calibration: weight and bias of the calibrated acceptance; empty: none.
    """

    name: str
    fields: Fields
    vocabulary: int
    hashes: dict[str, str]
    frequencies: list[list[float]]
    calibration: list[float]


class Drafter(nn.Module):
    """Guesses the next tokens of one row.

    Attributes:
        name: in the registry; empty if it was not registered.
        parts: names of other drafters whose fields it takes besides its own.
        needs: what it reads of the model.
        vocabulary: number of tokens of the model that it was made for; 0: any.
        costs: `petl.drafting.Costs` of the model that it drafts for, once they are known; `decode`
            sets them, and takes them in later calls without costs.
    """

    name: ClassVar[str] = ""
    parts: ClassVar[tuple[str, ...]] = ()
    needs: Needs = Needs()
    vocabulary: int = 0
    costs: Costs | None = None

    def start(self, ids: Sequence[int], states: Tensor | None) -> None:
        """Begin a row, after the pass over its prompt.

        With `Needs.encoder` it has one argument more, `encoder`: the tokens that the encoder has
        read, without padding; None if it has read no tokens, empty if they are no tokens of the
        decoder.

        Args:
            ids: of the prompt; of an encoder-decoder what its decoder begins with.
            states: [tokens of the pass, H]; None unless `Needs.prompt`.
        """

    def begin(
        self, ids: Sequence[int], states: Tensor | None, encoder: Sequence[int] | None = None
    ) -> None:
        """Call `start` with what this drafter needs."""
        more = {"encoder": encoder} if self.needs.encoder else {}
        self.start(ids, states, **more)

    def draft(self, root: Root, budget: int | None) -> Draft:
        """Return guesses of what follows the root.

        Args:
            root: where they begin.
            budget: the most drafts that are used; None: as the drafter likes.
        """
        raise NotImplementedError

    def observe(self, seen: PassOutput) -> None:
        """Learn from a pass, with drafts or without."""

    def loss(self, answers: DraftAnswers) -> Tensor:
        """Return the training loss on answers of the model, a scalar."""
        raise UnsupportedError(f"{self.name or type(self).__name__} has nothing to train")

    def save(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Write the drafter to a folder, from which `petl.load_drafter` reads it.

        Args:
            folder: is created.
            tokenizer: of the model, whose hash is kept by drafters that know its tokens.
        """
        raise UnsupportedError(f"{self.name or type(self).__name__} has nothing to save")

    def restore(self, config: DrafterConfig, tensors: dict[str, Tensor]) -> None:
        """Take over what `save` has written besides the fields; nothing here.

        Args:
            config: of drafter_config.json.
            tensors: of drafter_model.safetensors.
        """


DRAFTERS: dict[str, type[Drafter]] = {}


@runtime_checkable
class FittedDrafter(Protocol):
    """A drafter with weights that are fitted to `petl.drafting.Answers`."""

    def prepare(self, answers: DraftAnswers) -> None:
        """Take what does not train from answers."""

    def batches(
        self, answers: DraftAnswers, size: int, generator: torch.Generator
    ) -> Iterator[Tensor]:
        """Yield positions of answers in random order, about `size` at a time."""
        ...

    def count(self, answers: DraftAnswers) -> None:
        """Count rank frequencies on answers."""


@runtime_checkable
class TableDrafter(Protocol):
    """A drafter whose table is filled by decoding, or from `petl.drafting.Answers`."""

    def fill(self, answers: DraftAnswers, model: CausalModel) -> None:
        """Learn from answers of a model."""


def register(name: str) -> Callable[[DrafterClass], DrafterClass]:
    """Register a class of drafters as `name`; a decorator.

    Its constructor takes the model (or None) first, and its fields as keyword-only arguments.

    Raises:
        ValueError: the name is taken.
    """

    def add(cls: DrafterClass) -> DrafterClass:
        if name in DRAFTERS:
            raise ValueError(f"drafter name {name!r} is taken; choose another name")
        cls.name = name
        DRAFTERS[name] = cls
        return cls

    return add


def list_drafters() -> list[str]:
    """Return the names of all drafters, sorted."""
    return sorted(DRAFTERS)


def untrained() -> list[str]:
    """Return the names of the drafters that need no training, sorted."""
    return sorted(name for name, cls in DRAFTERS.items() if not issubclass(cls, FittedDrafter))


def fields_of(name: str) -> Fields:
    """Return the fields of a drafter with their defaults.

    Raises:
        UnknownNameError: there is no such drafter.
    """
    # the constructor is the only list of fields; `drafter` checks and `free` divides by it
    cls = choose(DRAFTERS, name, "drafter")
    parameters = inspect.signature(cls.__init__).parameters.values()
    own = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    # such a class takes `**fields`, of which the signature has no names
    for part in cls.parts:
        own |= fields_of(part)
    return own


def drafter(name: str, *, model: nn.Module | None = None, **fields: object) -> Drafter:
    """Build the drafter `name`.

    Args:
        name: one of `list_drafters()`.
        model: gives vocabulary, embeddings and head; a PeftModel or a model of transformers.
        fields: of the drafter.

    Raises:
        UnknownNameError: there is no such drafter, or it has no such field; the message suggests
            the closest matches.
        InputError: a value is out of range, or the drafter needs a model.
    """
    return of_fields(name, model, fields)


def of_fields(name: str, model: nn.Module | None, fields: Settings) -> Drafter:
    """Build a drafter of fields with any names, such as those of a file; see `drafter`."""
    known = fields_of(name)
    for field in fields:
        if field not in known:
            raise UnknownNameError(
                f"drafter {name!r} has no field {field!r}" + did_you_mean(field, known)
            )
    if model is not None:
        check_module(model, "petl.drafting.drafter")
    build: Callable[..., Drafter] = DRAFTERS[name]
    return build(model, **fields)


# Checks of a drafter's fields and vocabulary, which may be those of somebody else's file


def auto_or_count(high: int) -> Rule:
    """Rule for "auto", or an integer from 1 to `high`."""
    count = integer(1, high)
    return Rule(
        f"auto or {count.words}", lambda v: v == "auto" or (type(v) is int and count.holds(v))
    )


def vocabulary_of(model: nn.Module | None) -> int:
    """Return the number of tokens of a model.

    Raises:
        InputError: there is no model.
    """
    if model is None:
        raise InputError(f"model={model}: this drafter needs the model that it drafts for")
    return vocabulary_size(base_of(model))


def check_vocabulary(what: str, size: int, model: nn.Module) -> None:
    """Raise InputError unless a drafter of a vocabulary of this size, 0: any, fits a model."""
    own = vocabulary_of(model)
    if size not in (0, own):
        raise InputError(
            f"{what} has a vocabulary of {size} tokens and {type(model).__name__} one of {own}: "
            "it belongs to another model"
        )
