"""Times of answers with drafts, prompt by prompt, as records of section `drafting`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from sys import getsizeof
from typing import Any

import torch

from bench.clocks import Spread, in_turn
from bench.kept import Content
from bench.records import Record
from petl.drafting import Drafter
from petl.drafting.heads import Heads
from petl.drafting.lookup import Lookup


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
        elif isinstance(part, Heads):  # it keeps a copy of the rows that it uses
            size += len(part.vocab) * part.ends.width * part.dtype.itemsize
    return size


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
    prompt = torch.tensor([list(ids)])
    settings: dict[str, Any] = {
        "max_new_tokens": tokens, "min_new_tokens": tokens, "use_cache": True, "num_beams": 1,
        "do_sample": temperature is not None, "temperature": temperature, "pad_token_id": 0,
        "repetition_penalty": 1.0,
    }  # fmt: skip
    answers: dict[str, Any] = {}
    passes: dict[str, int] = {}
    failed: dict[str, str] = {}
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1

    def step(name: str, more: Mapping[str, Any]) -> Callable[[], None]:
        def run() -> None:
            before = count
            torch.manual_seed(seed)
            answers[name] = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), **{**settings, **more}
            )
            passes[name] = count - before - 1  # not that over the prompt

        return run

    steps = {row.name: step(row.name, row.arguments) for row in rows}
    hook = base.register_forward_hook(counted)
    try:
        with torch.no_grad():
            for row in rows:
                if not row.is_own:
                    _try(row, steps, failed, {"max_new_tokens": 2, "min_new_tokens": 2}, step)
            times = in_turn(step("plain", {}), steps, rounds=1, warm_up=0, device="cpu")
    finally:
        hook.remove()
    found: Content = {}
    for row in rows:
        if row.name in failed:
            found[row.name] = {"failed": failed[row.name]}
            continue
        (own,), (floor,) = times.candidate[row.name], times.floor[row.name]
        found[row.name] = {
            "seconds": own,
            "plain": floor,
            "passes": passes[row.name],
            "bytes": row.memory + (0 if row.drafter is None else size_of(row.drafter)),
            "equal": torch.equal(answers[row.name], answers["plain"]),
        }
    return found


def _try(
    row: Answerer,
    steps: dict[str, Callable[[], None]],
    failed: dict[str, str],
    short: Mapping[str, Any],
    step: Callable[[str, Mapping[str, Any]], Callable[[], None]],
) -> None:
    """Run transformers' own drafts briefly: they may not serve a model."""
    try:
        step(row.name, {**row.arguments, **short})()
    except (ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        failed[row.name] = f"{type(error).__name__}: {error}"
        del steps[row.name]


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
