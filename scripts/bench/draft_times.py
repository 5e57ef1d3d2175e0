"""Times of answers with drafts, prompt by prompt, as records of section `drafting`."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from sys import getsizeof
from typing import Any

import torch

from bench.clocks import Spread, in_turn
from bench.kept import Content
from bench.records import Record
from petl.efficiency.drafting import Drafter
from petl.efficiency.drafting.heads import DraftHeads
from petl.efficiency.drafting.lookup import Lookup


@dataclass(frozen=True)
class Answerer:
    """A way to answer: arguments of `generate` beside the common ones, and its drafter.

    Attributes:
        memory: bytes that it takes besides its drafter.
    """

    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    drafter: Drafter | None = None
    memory: int = 0
    is_own: bool = True


def size_of(drafter: Drafter) -> int:
    """Return the bytes of a drafter: weights, tables, n-grams of the text, rows of the head."""
    size = sum(tensor.nbytes for tensor in drafter.state_dict().values())
    for part in drafter.modules():
        if isinstance(part, Lookup):
            size += getsizeof(part.places) + sum(map(getsizeof, part.places))
        elif isinstance(part, DraftHeads):  # it keeps a copy of the rows that it uses
            size += len(part.vocab) * part.ends.width * part.dtype.itemsize
    return size


@dataclass
class Trials:
    """Answers to one prompt and the passes they took, by the name of the way.

    Attributes:
        model: with its adapters.
        ids: of the prompt.
        settings: arguments of `generate` common to all ways.
        seed: of the random numbers of each answer.
    """

    model: Any
    ids: Sequence[int]
    settings: Mapping[str, Any]
    seed: int
    answers: dict[str, torch.Tensor] = field(default_factory=dict)
    passes: dict[str, int] = field(default_factory=dict)
    _count: int = 0

    def answer(self, name: str, more: Mapping[str, Any]) -> None:
        """Answer in one way, with its own arguments of `generate`."""
        prompt = torch.tensor([list(self.ids)])
        arguments = {**self.settings, **more}
        before = self._count
        torch.manual_seed(self.seed)
        self.answers[name] = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments
        )
        self.passes[name] = self._count - before - 1  # not that over the prompt

    @contextmanager
    def counted(self, base: Any) -> Iterator[None]:
        """Count the passes of the model of transformers; without gradients."""

        def count(*_: Any) -> None:
            self._count += 1

        hook = base.register_forward_hook(count)
        try:
            with torch.no_grad():
                yield
        finally:
            hook.remove()

    def refusal(self, row: Answerer) -> str:
        """Return why transformers refuses to draft in this way, "" if it does not."""
        short = {"max_new_tokens": 2, "min_new_tokens": 2}
        try:
            self.answer(row.name, {**row.arguments, **short})
        except (ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
            return f"{type(error).__name__}: {error}"
        return ""


def timed(
    model: Any,
    base: Any,
    ids: Sequence[int],
    rows: Sequence[Answerer],
    tokens: int,
    *,
    seed: int = 0,
    temperature: float | None = None,
) -> Content:
    """Answer a prompt in all ways, plain decoding in turn with the others.

    Args:
        model: with its adapters.
        base: the model of transformers in it, whose passes are counted.
        ids: of the prompt.
        rows: the ways.
        tokens: of an answer.
        seed: of the random numbers.
        temperature: None: greedy.

    Returns:
        By row: seconds, those of plain decoding, passes after that over the prompt, bytes, and if
        the answer was that of plain decoding; or why transformers refused to draft.
    """
    settings: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "use_cache": True, "num_beams": 1,
        "do_sample": temperature is not None, "temperature": temperature, "pad_token_id": 0,
        "repetition_penalty": 1.0,
    }  # fmt: skip
    trials = Trials(model, ids, settings, seed)
    with trials.counted(base):
        refused = {row.name: trials.refusal(row) for row in rows if not row.is_own}
        ways = {
            row.name: partial(trials.answer, row.name, row.arguments)
            for row in rows
            if not refused.get(row.name)
        }
        plain = partial(trials.answer, "plain", {})
        times = in_turn(plain, ways, rounds=1, warm_up=0, device="cpu")
    found: Content = {name: {"failed": reason} for name, reason in refused.items() if reason}
    for row in rows:
        if row.name not in ways:
            continue
        (own,), (floor,) = times.candidate[row.name], times.floor[row.name]
        found[row.name] = {
            "seconds": own,
            "plain": floor,
            "passes": trials.passes[row.name],
            "bytes": row.memory + (0 if row.drafter is None else size_of(row.drafter)),
            "equal": torch.equal(trials.answers[row.name], trials.answers["plain"]),
        }
    return found


def plain_seconds(found: Sequence[Content], tokens: int) -> float:
    """Return the mean seconds of a token of plain decoding over some prompts."""
    values = [
        row["plain"] for content in found for row in content["rows"].values() if "plain" in row
    ]
    return sum(values) / len(values) / tokens


def record(
    shape: str,
    row: Answerer,
    found: Sequence[Content],
    tokens: int,
    plain_base: float,
    facts: Mapping[str, float],
) -> Record:
    """Return the record of a row.

    Args:
        found: of each prompt, its `kind` and `rows` as of `timed`.
        tokens: of an answer.
        plain_base: seconds of a token of the base model; 0: not measured.
        facts: further values.
    """
    mine = [(content["kind"], content["rows"][row.name]) for content in found]
    refused = [values["failed"] for _, values in mine if "failed" in values]
    if refused:
        return Record("drafting", shape, row.name, failed=refused[0], is_own=row.is_own)
    kinds: dict[str, list[float]] = {}
    for kind, values in mine:
        kinds.setdefault(kind, []).append(values["seconds"] / values["plain"])
    speeds = {kind: len(ratios) / sum(ratios) for kind, ratios in kinds.items()}
    own: dict[str, float] = {"speed": sum(speeds.values()) / len(speeds)}
    own |= speeds if len(speeds) > 1 else {}
    if plain_base:
        seconds = sum(values["seconds"] for _, values in mine) / len(mine) / tokens
        own["speed / plain base"] = plain_base / seconds
    after_prompt = (tokens - 1) * len(mine)
    passes = sum(values["passes"] for _, values in mine)
    counts: dict[str, float] = {"unequal answers": sum(not v["equal"] for _, v in mine)}
    own["tokens / pass"] = after_prompt / passes
    counts["passes / token"] = passes / after_prompt
    own["memory MB"] = max(values["bytes"] for _, values in mine) / 1e6
    return Record(
        "drafting",
        shape,
        row.name,
        is_own=row.is_own,
        ratios={"time / plain": Spread.of([r for ratios in kinds.values() for r in ratios])},
        counts=counts,
        facts={**own, **facts},
    )
