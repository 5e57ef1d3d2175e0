"""The commands generate and chat: what they print."""

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from tempfile import TemporaryDirectory
from typing import Any

from transformers import set_seed

from petl.cli.answering import own_weights, show, tell_if_cut, text_of
from petl.cli.chat_commands import run
from petl.cli.table import BATCH, LLAMA, PETL, AnswerOptions, ChatOptions, GenerateOptions
from petl.core.types import Record
from petl.data.tasks.image_text.prompt import Conversation
from petl.efficiency.drafting import PROMISE, Costs, Stats, check_answer, verify
from petl.errors import InputError, printable
from petl.generation.inference import prompts
from petl.generation.inference.chat import ChatSession as Session
from petl.generation.inference.grammar import json_grammar
from petl.generation.inference.language_model import BASE as BASE_NAME
from petl.generation.inference.language_model import LanguageModel, Prompt, message
from petl.generation.inference.loading import DEFAULT, load_language_model
from petl.generation.inference.prompts import Question, read_prompts
from petl.generation.inference.sampling import SETTINGS, Sample, Sampling
from petl.generation.prediction.files import PredictionFile
from petl.generation.prediction.tables import as_line, new_table, reported
from petl.system.files.paths import file_of
from petl.system.files.read import read_json
from petl.system.progress import Pass

ENDING = 10.0  # seconds that an engine may take to end
logger = logging.getLogger("petl")

# Shared by both


def load(options: AnswerOptions, stack: ExitStack) -> LanguageModel:
    """Load the model of a command; files that its engine needs go with `stack`."""
    # dict() would keep the last one without a message
    names = [name for name, _ in options.adapter]
    if len({*names}) < len(names):
        raise InputError(f"--adapter names {max(names, key=names.count)!r} twice")
    if options.engine == LLAMA:
        return _load_engine(options, stack)
    model = load_language_model(
        options.run,
        dict(options.adapter),
        plain=options.plain,
        trust_remote_code=options.trust_remote_code,
        other_base=options.other_base,
        drafting=options.drafter,
        weights=own_weights(options),
    )
    if options.drafter != "auto":
        with model.using(model.names[0]):
            _ = model.drafter  # one that cannot be used is refused before the first answer
    return model


def _load_engine(options: AnswerOptions, stack: ExitStack) -> LanguageModel:
    """Load the model into llama.cpp."""
    if options.drafter not in ("auto", "none"):
        raise InputError(f"--drafter={options.drafter} is for --engine {PETL}: {LLAMA} has none")
    if isinstance(options, GenerateOptions) and options.check:
        raise InputError(f"--check is of drafts, and --engine {LLAMA} has none: leave it out")
    if options.json_schema is not None or options.prompt_lookup is not None:
        raise InputError(
            f"--json-schema and --prompt-lookup are for --engine {PETL}: leave them out, or leave "
            f"out --engine {LLAMA}"
        )
    taken = next((name for name, _ in options.adapter if name in (DEFAULT, BASE_NAME)), None)
    if taken is not None:
        raise InputError(f"the adapter name {taken!r} is taken; choose another one")
    # imports what `petl serve` needs
    load_engine_model = resolve_name("petl.generation.serving.engine_model:load_engine_model")
    model = load_engine_model(
        {DEFAULT: options.run, **dict(options.adapter)},
        Path(stack.enter_context(TemporaryDirectory(prefix="petl-engine-"))),
        seed=options.seed,
        plain=options.plain,
        trust_remote_code=options.trust_remote_code,
        other_base=options.other_base,
        weights=options.weights,
    )
    stack.callback(model.engine.join, ENDING)
    stack.callback(model.engine.close)  # the last is called first
    return model


def sampling_of(options: AnswerOptions) -> Sampling:
    """Return the settings of sampling of a command, and seed the random numbers."""
    set_seed(options.seed)
    given = {name: getattr(options, name) for name in SETTINGS}
    file = options.json_schema
    grammar = None if file is None else json_grammar(read_json(file, dict[str, Any]))
    return Sampling(**given, stop=tuple(options.stop), grammar=grammar)


# petl generate


def generate(options: GenerateOptions) -> None:
    """Answer the prompts; print the answers, or write them to a file."""
    with ExitStack() as stack:
        _generate(options, stack)


def _generate(options: GenerateOptions, stack: ExitStack) -> None:
    if options.image and options.file is not None:
        raise InputError(
            f"--image={options.image[0]} is for --prompt; rows of --file={options.file} name their "
            "images themselves"
        )
    if options.out is not None:
        read = [] if options.file is None else [options.file]
        PredictionFile(options.out).check(read)  # before the model is loaded
    sampling = sampling_of(options)
    batch_size = _batch_size(options)
    model = load(options, stack)
    # the last name is that of the base model, see `LanguageModel.names`
    names = [*model.adapters] or [model.names[-1]]
    if options.base and model.adapters:
        names.append(model.names[-1])
    if options.check:
        _check_drafts(model, names, next(_questions(options, model)).prompt, options.system)
    if options.file is None and options.out is None:
        stats = _print_answers(options, model, sampling, names)
    else:
        stats = _write_answers(options, model, sampling, names, batch_size)
    if options.stats:
        _tell_stats(model, stats)


def _batch_size(options: GenerateOptions) -> int:
    """Return how many prompts of a file, or with --out, are answered together.

    Raises:
        InputError: several are asked for with a setting that is for one at a time.
    """
    single = {
        "--stats": options.stats,
        f"--drafter {options.drafter}": options.drafter not in ("auto", "none"),
        "--prompt-lookup": options.prompt_lookup is not None,
    }
    reason = next((name for name, is_given in single.items() if is_given), "")
    if reason and (options.batch_size or 1) > 1:
        raise InputError(
            f"--batch-size={options.batch_size} with {reason}, which is for one prompt at a "
            "time: leave out one of them"
        )
    return 1 if reason else options.batch_size or BATCH


def _check_drafts(
    model: LanguageModel, names: list[str], prompt: Prompt, system: str | None
) -> None:
    """Check passes over several tokens, and an answer with drafts, with each adapter."""
    ids = model.encode(prompt, system)
    for name in names:
        with model.using(name):
            gap = verify(model.model)
            below = check_answer(model.model, ids, model.drafter or "free")
        title = _title(model, name)
        logger.info("%s: logits with drafts differ by at most %.1e", title, gap)
        logger.info("%s: tokens of an answer are at most %.1e below the best", title, below)
    logger.info(PROMISE)


def _tell_stats(model: LanguageModel, stats: Stats) -> None:
    """Log what drafts saved, against the passes of plain decoding at their measured time."""
    if not stats.passes:
        logger.info(
            "%d tokens of %d answers in %.1f s, their prompts included; none with drafts",
            stats.tokens,
            stats.answers,
            stats.seconds,
        )
        return
    # what `generate` does between passes comes on top
    known = None if model.drafter is None else model.drafter.costs
    second = None if known is None else known.plain
    if second is None:
        second = Costs.measure(model.base, counts=(1,)).seconds[1]
    plain = second * (stats.tokens - stats.answers)
    logger.info(
        "%d tokens in %d passes after the prompts: %.2f tokens a pass; %d of %d drafts were right; "
        "%.1f s, and the passes of plain decoding at least %.1f s",
        stats.tokens,
        stats.passes,
        stats.tokens_per_pass,
        stats.accepted,
        stats.drafted,
        stats.seconds,
        plain,
    )


def _print_answers(
    options: GenerateOptions, model: LanguageModel, sampling: Sampling, names: list[str]
) -> Stats:
    """Print the answers to `--prompt` while they are written; return what drafts did."""
    stats = Stats()
    for question in _questions(options, model):
        ids = model.encode(question.prompt, options.system)
        for name in names:
            if len(names) > 1:
                show(f"[{_title(model, name)}]\n")
            with model.using(name):
                (answer,) = model.answer([ids], sampling, write=show, stats=stats)
            # an empty line between the answers of several adapters
            show("\n" * (1 + (len(names) > 1)))
            tell_if_cut(answer)
    return stats


def _prompts(options: GenerateOptions) -> list[str]:
    # kept: standard input can be read once only
    readers = [sys.stdin.read if each == "-" else partial(str, each) for each in options.prompt]
    options.prompt = [text_of(read) for read in readers]
    return options.prompt


def _title(model: LanguageModel, name: str) -> str:
    return f"{name}: {model.adapters[name]}" if name in model.adapters else f"{name}: {model.name}"


def _write_answers(
    options: GenerateOptions,
    model: LanguageModel,
    sampling: Sampling,
    names: list[str],
    batch_size: int,
) -> Stats:
    """Write the answers as JSON lines, to `--out` or to standard output."""
    of = "the prompts" if options.file is None else printable(options.file)
    # before the first answer: an error in a later prompt would discard those before it
    prompts.check_prompts(model, _questions(options, model), options.system)
    stats = Stats()
    shown = Pass(f"answering {of}", None, unit="answers", prints=options.out is None)
    answers = prompts.answered(
        model,
        _questions(options, model),
        sampling,
        names=names,
        system=options.system,
        batch_size=batch_size,
        stats=stats,
        count=shown.advance,
    )
    # lazy: an answer is written while later ones are not computed yet
    records = (_record(question.row, found) for question, found in answers)
    if options.out is None:
        with shown:
            for record in records:
                show(f"{as_line(record)}\n")
        return stats
    with shown, new_table(options.out) as table:
        for record in records:
            with reported(options.out):
                table.write([record])
    logger.info("%d answers in %s", shown.done, options.out)
    return stats


def _questions(options: GenerateOptions, model: LanguageModel) -> Iterator[Question]:
    """The prompts with the rows that they are from: those of the file, or of --prompt."""
    if options.file is not None:
        return read_prompts(options.file, model, system=options.system)
    # as rows of a file with the column prompt
    return (
        Question({"prompt": prompt}, _with_images(prompt, options.image))
        for prompt in _prompts(options)
    )


def _with_images(prompt: str, paths: Sequence[str]) -> Prompt:
    if not paths:
        return prompt
    images = tuple(str(file_of("--image", path)) for path in paths)
    return Conversation([message("user", prompt, len(images))], images)


def _record(row: Mapping[str, object], found: Mapping[str, Sample]) -> Record:
    """A row with its answers: that of the first adapter, and others by name."""
    first, *others = found  # in the order of `names`
    more = {f"generated_{name}": found[name].text for name in others}
    return {**row, "generated": found[first].text, **more}


# petl chat


def chat(options: ChatOptions) -> None:
    """Chat until the end of the input."""
    sampling = sampling_of(options)
    with ExitStack() as stack:
        model = load(options, stack)
        # names[0]: the first adapter, if there is one
        adapter = model.names[-1] if options.base else model.names[0]
        run(Session(model, sampling, adapter, options.system))
