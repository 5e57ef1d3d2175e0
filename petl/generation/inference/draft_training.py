"""Training of a drafter for a saved model: prompts, answers, heads or a table, the saved folder."""

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core.parameters import max_positions
from petl.core.types import Settings
from petl.data.tasks.base import pad_id
from petl.data.tasks.causal_lm import CausalLM
from petl.data.tasks.chat import last_answer
from petl.efficiency.drafting import (
    DraftAnswers,
    Drafter,
    Stats,
    answers,
    decode,
    fit,
    load_drafter,
)
from petl.efficiency.drafting import drafter as build
from petl.efficiency.drafting.answers import seeded
from petl.efficiency.drafting.calls import why_untrained
from petl.efficiency.drafting.fit import TARGETS
from petl.efficiency.drafting.folder import CONFIG, WEIGHTS, read
from petl.efficiency.drafting.lookup import LookupFirst
from petl.efficiency.drafting.registry import FittedDrafter, TableDrafter
from petl.errors import InputError, UnsupportedError
from petl.generation.inference.language_model import LanguageModel
from petl.generation.inference.loading import DRAFTER, Found, find_model, load_language_model
from petl.generation.inference.prompts import read_prompts
from petl.system.collectives import number
from petl.system.files.disk import atomic_folder, write_atomic
from petl.system.files.outputs import check_output
from petl.system.settings.schema import plain
from petl.system.values import check_rules, field, integer, one_of, read_fields, real
from petl.training.distributed.launch import number_of_processes, start

CARD = "README.md"
SOURCES = ("decode", "answers")  # of the table of a drafter without weights
FEW = 2000  # tokens of all answers; assumption: with 8,700 heads were right 4 times in 10
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DraftSettings:
    """The settings under `draft`, see configs/draft.yaml.

    Raises:
        InputError: a value is out of range.
    """

    answers: int = field(200, integer(1))
    tokens: int = field(128, integer(1))
    file: str | None = None
    prompt_tokens: int = field(32, integer(1))
    temperature: float = field(0.0, real(0))
    batch_size: int = field(16, integer(1))
    epochs: int = field(4, integer(1))
    lr: float = field(1e-3, real(0, above=True))
    batch: int = field(128, integer(1))
    target: str = field("hard", one_of(*TARGETS))
    source: str | None = field(None, one_of(*SOURCES))
    measured: int = field(8, integer(0))
    seed: int = field(0, integer(0))

    def __post_init__(self) -> None:
        check_rules(self, "draft")


class DraftResult(NamedTuple):
    """A drafter that was trained and written.

    Attributes:
        folder: of its files.
        answers: number of them.
        tokens: of the answers.
        loss: of heads at the end, over all answers; None: a table was filled.
        frequencies: rank frequencies by head or depth, then rank.
        alone, behind_lookup: counts of decoding the measured prompts, without and with `lookup` in
            front, as `--drafter auto` has it.
    """

    folder: Path
    answers: int
    tokens: int
    loss: float | None
    frequencies: list[list[float]]
    alone: Stats
    behind_lookup: Stats


def train_drafter(
    run: str | Path, cfg: Any, *, trust_remote_code: bool = False, other_base: bool = False
) -> DraftResult | None:
    """Train the drafter that a configuration names for a model, and write RUN/drafter.

    Several processes (`torchrun`) share the prompts; the first of them trains and writes.

    Args:
        run: folder of a run, of an adapter, or of a model, such as a merged one.
        cfg: composed from configs/draft.yaml.

    Returns:
        None in all processes but the first.

    Raises:
        InputError: a setting cannot be used, there are no prompts, or the run has no model that
            writes.
        UnsupportedError: the model cannot be decoded with drafts.
    """
    composed = plain(cfg)
    settings = read_fields(DraftSettings, composed["draft"], "draft")
    # all settings before the model, which takes longest to load
    name, fields = _chosen(composed)
    if number_of_processes() > 1:
        start(settings.seed, "no")  # the group of processes, which share the prompts
    found = find_model(run, trust_remote_code=trust_remote_code)
    check_output(Path(run) / DRAFTER, (CONFIG, WEIGHTS, CARD), (CONFIG,), inside=True)
    language = load_language_model(
        run, drafting="none", trust_remote_code=trust_remote_code, other_base=other_base
    )
    reason = why_untrained(language.base)
    if reason:
        raise UnsupportedError(reason)
    # before the answers, which take minutes
    drafter = build(name, model=language.base, **fields)
    if not isinstance(drafter, FittedDrafter | TableDrafter):
        raise InputError(f"drafter {name!r} has nothing to train; hydra and recycling have")
    source = _source(drafter, settings)
    prompts, measured = _prompts(language, found, settings)
    generation = _generation(language, settings.temperature)
    # the first name is the adapter's, or the base model's if there is none
    with seeded(language.base, settings.seed), language.using(language.names[0]):
        # decoding teaches the table, so there is nothing to keep of the answers
        if source == "decode":
            stats = _decoded(language, drafter, prompts, settings)
            return _written(Path(run), language, drafter, (stats.answers, stats.tokens, None),
                            fields, settings, measured)  # fmt: skip
        made = answers(
            language.model,
            prompts,
            tokens=settings.tokens,
            batch_size=settings.batch_size,
            **generation,
        )
        if number() > 0:
            return None  # at once: a process group does not wait for ever
        tokens, loss = len(made.ids) - sum(made.starts), None
        if isinstance(drafter, FittedDrafter):
            loss = _fitted(drafter, made, tokens, settings)
        else:
            drafter.fill(made, language.base)
        given = (len(made), tokens, loss)
        return _written(Path(run), language, drafter, given, fields, settings, measured)


def _source(drafter: Drafter, settings: DraftSettings) -> str:
    """Return what a drafter learns from: `SOURCES`.

    Raises:
        InputError: heads cannot learn while they decode, nor can several processes fill one table
            so.
    """
    if isinstance(drafter, FittedDrafter):
        if settings.source == "decode":
            raise InputError(
                f"draft.source=decode: the heads of {drafter.name} are trained on answers; leave "
                "it out"
            )
        return "answers"
    source = settings.source or SOURCES[0]
    if source == "decode" and number_of_processes() > 1:
        raise InputError(
            f"draft.source=decode: {number_of_processes()} processes share the answers of "
            "draft.source=answers only; set it, or start one process"
        )
    return source


def _fitted(drafter: Drafter, made: DraftAnswers, tokens: int, settings: DraftSettings) -> float:
    """Train heads on answers, and return the loss at the end."""
    if tokens < FEW:
        logger.warning(
            "the %d answers have %s tokens, %.3g each: heads learn little from fewer than %s. To "
            "have more, raise draft.answers, or name prompts with longer answers by draft.file. "
            "Answers that short leave little to draft, and --drafter free needs no training",
            len(made), f"{tokens:,}", tokens / len(made), f"{FEW:,}",
        )  # fmt: skip
    return fit(
        drafter,
        made,
        epochs=settings.epochs,
        lr=settings.lr,
        batch=settings.batch,
        target=settings.target,
        seed=settings.seed,
    )


def _written(
    run: Path,
    language: LanguageModel,
    drafter: Drafter,
    given: tuple[int, int, float | None],
    fields: Settings,
    settings: DraftSettings,
    measured: Sequence[Sequence[int]],
) -> DraftResult:
    """Write a drafter to RUN/drafter with what it gives on further prompts.

    Args:
        given: number of answers, their tokens, and the loss.
    """
    folder = run / DRAFTER
    # an earlier drafter stays until this one is complete
    with atomic_folder(folder) as draft:
        drafter.save(draft, language.tokenizer)
        # as it will be used, in the dtype of the model; one for each, since tables go on learning
        saved = [load_drafter(draft, language.base, language.tokenizer) for _ in range(2)]
        alone, behind = (
            _decoded(language, each, measured, settings)
            for each in (saved[0], LookupFirst(saved[1]))
        )
        result = DraftResult(folder, *given, read(draft)["frequencies"], alone, behind)
        write_atomic(draft / CARD, card(drafter.name, fields, settings, result))
    return result


def _chosen(composed: Settings) -> tuple[str, Settings]:
    """Return name and fields of the drafter that a configuration chooses."""
    fields = composed.get("drafter")
    if not isinstance(fields, Mapping) or "name" not in fields:
        raise InputError(f"drafter={fields!r}: no drafter is chosen: add +drafter=hydra")
    return str(fields["name"]), {key: v for key, v in fields.items() if key != "name"}


def _generation(language: LanguageModel, temperature: float) -> Settings:
    """Return the arguments of `generate` for a temperature."""
    # neutral values, or transformers warns of those in the model's generation config
    greedy = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}
    sampled = {"do_sample": True, "temperature": temperature}
    return {
        **(sampled if temperature else greedy),
        "eos_token_id": language.ends,
        "pad_token_id": pad_id(language.tokenizer),
    }


def _decoded(
    language: LanguageModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    settings: DraftSettings,
) -> Stats:
    """Return the counts of decoding prompts one after the other."""
    stats = Stats()
    writer: Any = language.model
    generation = _generation(language, settings.temperature)
    # the switch would hide how many tokens a pass gives
    drafts = {"custom_generate": decode, "drafter": drafter, "stats": stats, "switch": False}
    for prompt in prompts:
        ids = torch.tensor([prompt], device=language.base.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        writer.generate(**inputs, **generation, **drafts, max_new_tokens=settings.tokens)
    return stats


# Prompts


def _prompts(
    language: LanguageModel, found: Found, settings: DraftSettings
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the ids of the prompts that are answered, and of those that are measured.

    Raises:
        InputError: there are none that leave room for an answer.
    """
    if language.processor is not None:
        raise UnsupportedError(
            f"{language.name} reads images, and answers about images are decoded without drafts"
        )
    draw = random.Random(settings.seed)
    if settings.file is not None:
        read = read_prompts(settings.file, language)
        chosen = [[*language.encode(each.prompt)] for each in read]
        draw.shuffle(chosen)
    elif isinstance(found, SavedAdapter) and found.run is not None:
        chosen = _training_prompts(language, found, settings, draw)
    else:
        raise InputError(
            f"draft.file={settings.file}: without a run there are no training examples, so name a "
            "file of prompts"
        )
    # a prompt that is cut is another question: too long ones are left out
    limit = max_positions(language.base)
    room = None if limit is None else limit - settings.tokens
    fits = [ids for ids in chosen if ids and (room is None or len(ids) <= room)]
    if len(fits) <= settings.measured:
        raise InputError(
            f"{len(fits)} of {len(chosen)} prompts leave room for draft.tokens={settings.tokens} "
            f"in {limit} positions, and draft.measured={settings.measured} of them are not "
            "trained on: give more, or set draft.measured=0"
        )
    fits = fits[: settings.answers + settings.measured]
    count = len(fits) - settings.measured
    return fits[:count], fits[count:]


def _training_prompts(
    language: LanguageModel, saved: SavedAdapter, settings: DraftSettings, draw: random.Random
) -> list[list[int]]:
    """Return prompts from the run's training examples, in random order."""
    data = saved.data
    task, rows = data.task, data.train
    if not isinstance(task, CausalLM) or not isinstance(rows, Dataset):
        raise InputError(
            f"the training examples of {saved.run} are no texts or chats: set draft.file=FILE"
        )
    wanted = settings.answers + settings.measured
    if task.chat:
        numbers = draw.sample(range(len(rows)), min(wanted, len(rows)))
        chats = (rows[i]["messages"] for i in numbers)
        # rows without an answer are not trained on either
        chats = [chat for chat in chats if any(turn["role"] == "assistant" for turn in chat)]
        return [last_answer(language.tokenizer, chat)[0] for chat in chats]
    return _beginnings(language.tokenizer, rows, wanted, settings.prompt_tokens, draw)


def _beginnings(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, wanted: int, length: int, draw: random.Random
) -> list[list[int]]:
    """Return pieces of `length` tokens of plain texts, from random places."""
    texts: dict[int, list[int]] = {}
    found: list[list[int]] = []
    # a book may be one row: rows are drawn with repetition, each time at another place
    for i in (draw.randrange(len(rows)) for _ in range(wanted)):
        if i not in texts:
            texts[i] = tokenizer(rows[i]["text"], verbose=False)["input_ids"]
        start = draw.randint(0, max(0, len(texts[i]) - length))
        found.append(texts[i][start : start + length])
    return found


# The page


def card(name: str, fields: Settings, settings: DraftSettings, result: DraftResult) -> str:
    """Return README.md of a drafter: how it was trained, and what it gave on other prompts."""
    rows = [
        f"| {i} | {' | '.join(f'{value:.3f}' for value in row[:3])} | {sum(row):.3f} |"
        for i, row in enumerate(result.frequencies, start=1)
    ]
    own = ", ".join(f"{key}={value}" for key, value in fields.items())
    found = (
        f"Measured on {settings.measured} prompts that it was not trained on, up to "
        f"{settings.tokens} tokens each: {result.alone.tokens_per_pass:.2f} tokens per pass of "
        f"the model alone, {result.behind_lookup.tokens_per_pass:.2f} behind `lookup`, as "
        "`--drafter auto` uses it. Plain decoding gives 1."
        if result.alone.passes
        else "Its tokens per pass were not measured."
    )
    kind = TABLE if result.loss is None else HEADS
    trained = kind["trained"].format(
        answers=result.answers, tokens=result.tokens, epochs=settings.epochs, loss=result.loss
    )
    words = {**kind, "trained": trained, "name": name, "own": own, "found": found}
    return CARD_TEXT.format(**words, rows="\n".join(rows))


HEADS = {
    "what": "Heads",
    "trained": "Trained on {answers} answers of that model, {tokens:,} tokens, for {epochs} "
    "epochs; loss {loss:.3f}.",
    "which": "a head's most likely, second, third, or one of its kept ranks, given the tokens "
    "before it,\nin answers that were held out (of ten or more)",
    "unit": "head",
}
TABLE = {
    "what": "The table",
    "trained": "Filled with {answers} answers of that model, {tokens:,} tokens.",
    "which": "the first, second, third, or any of a row of the table, given the tokens before it,\n"
    "while the table was filled",
    "unit": "depth",
}
CARD_TEXT = """\
# Drafter

{what} of the drafter `{name}` ({own}) of petl. It guesses tokens ahead of one model with one
adapter, which verifies the guesses: answers stay what they are, and come in fewer passes.

{trained}
{found}

How often the true token was {which}:

| {unit} | 1 | 2 | 3 | any |
| --- | --- | --- | --- | --- |
{rows}

`petl generate` finds it in the folder of the run. In code:

```python
drafter = petl.load_drafter("drafter", model, tokenizer)
model.generate(**inputs, custom_generate=petl.drafting.decode, drafter=drafter)
```
"""
