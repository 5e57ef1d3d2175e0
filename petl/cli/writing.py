"""The commands generate and chat: their arguments and what they print.

Like petl.cli.main, imports nothing heavy until a command runs.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from petl.cli.answering import show, tell_if_cut, text_of
from petl.cli.arguments import COUNT, SEED, Add, add_run, file_to_write, number
from petl.errors import InputError, printable

if TYPE_CHECKING:
    from petl.efficiency.drafting import Stats
    from petl.generation.inference.language_model import LanguageModel, Prompt
    from petl.generation.inference.prompts import Question
    from petl.generation.inference.sampling import Answer, Sampling

logger = logging.getLogger("petl")


BATCH = 8  # prompts of a file at a time

# Arguments


def add_parsers(add: Add) -> None:
    """Add the parsers of the commands with `add`."""
    generate = add("generate", "let a model answer prompts", GENERATE)
    _add_model(generate)
    prompts = generate.add_mutually_exclusive_group(required=True)
    prompts.add_argument(
        "--prompt", metavar="TEXT", action="append", help="a prompt; may be repeated; - reads stdin"
    )
    prompts.add_argument(
        "--file", metavar="FILE", help="prompts: .txt (one per line), .jsonl, .csv, .parquet, ..."
    )
    generate.add_argument(
        "--out",
        metavar="FILE",
        type=file_to_write,
        help="write answers to this file: .jsonl, .csv, .tsv, .parquet",
    )
    generate.add_argument(
        "--base", action="store_true", help="also answer with the base model, without an adapter"
    )
    generate.add_argument(
        "--batch-size",
        metavar="N",
        type=COUNT,
        help=f"prompts at a time (default: {BATCH}; 1 with a drafter, --stats or --prompt-lookup)",
    )
    _add_sampling(generate)
    generate.add_argument(
        "--check",
        action="store_true",
        help="first test that passes over several tokens give what single ones give, and that an "
        "answer to the first prompt is what drafts promise",
    )
    generate.add_argument(
        "--stats", action="store_true", help="print what drafts saved; one prompt at a time"
    )
    chat = add("chat", "chat with a model in the terminal", CHAT)
    _add_model(chat)
    chat.add_argument(
        "--base", action="store_true", help="begin with the base model, without an adapter"
    )
    _add_sampling(chat)


def _add_model(command: argparse.ArgumentParser) -> None:
    add_run(command, what="folder of a run, of an adapter, or of a merged model")
    command.add_argument(
        "--adapter",
        metavar="NAME=RUN",
        action="append",
        type=_named,
        default=[],
        help="a further adapter on the same base model, and its name; may be repeated",
    )
    command.add_argument("--system", metavar="TEXT", help="system prompt (default: the run's)")
    command.add_argument("--drafter", metavar="NAME", default="auto", help=DRAFTER)
    command.add_argument(
        "--plain",
        action=argparse.BooleanOptionalAction,  # neither form: None, which is decided by the run
        help="continue plain text, without the chat template (default: if the run has learned from "
        "plain text, or the model has no template)",
    )


def _add_sampling(command: argparse.ArgumentParser) -> None:
    def add(name: str, type: Callable[[str], Any], meaning: str) -> None:
        command.add_argument(f"--{name}", metavar="X", type=type, help=meaning)

    # without defaults: None is the value of the model's generation config
    add("max-new-tokens", COUNT, "tokens of an answer at most (default: the model's, else 512)")
    add("temperature", number(float, 0, 100), "of sampling; 0: always the most likely token")
    add("top-p", number(float, 0, 1), "sample from the most likely tokens of this probability")
    add("top-k", number(int, 0, 10**6), "sample from this many most likely tokens; 0: from all")
    add("repetition-penalty", number(float, 0.01, 100), "above 1: avoid tokens that occurred")
    add("prompt-lookup", number(int, 1, 1000), PROMPT_LOOKUP)
    command.add_argument(
        "--stop",
        metavar="TEXT",
        action="append",
        default=[],
        help="end an answer before this text; may be repeated",
    )
    command.add_argument(
        "--seed", metavar="N", type=SEED, default=0, help="of sampling (default: 0)"
    )


def _named(text: str) -> tuple[str, str]:
    name, separator, path = text.partition("=")  # a path may contain =, a name does not
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=RUN")
    return name, path


PROMPT_LOOKUP = (
    "guess up to this many tokens from earlier text and verify them in one pass: faster where "
    "answers repeat the prompt; greedy answers stay the same (up to rounding below float32)"
)

DRAFTER = (
    "what guesses tokens ahead, for the same answer in less time: free (copies and recycles "
    "tokens), lookup or recycling (one of the two), none, the folder of a drafter, or auto, the "
    "run's own or else free (default: auto)"
)

GENERATE = """\
Let a model answer prompts: the adapter of a run on its base model, or a merged model. Prompts are
turns of the user in the model's chat template, or plain text to continue for models without one.

  petl generate RUN --prompt "What is MoLA?"
  petl generate RUN --file questions.jsonl --out answers.jsonl
  petl generate RUN --adapter other=RUN2 --base --prompt "What is MoLA?"  # answers side by side

Rows of a file have the columns that the run was trained on, or those of a known format (messages,
prompt, instruction, text); answers need not be there. Answers come in the order of the file, as
rows with the columns of the file and `generated`; those of further adapters and of the base model
are in generated_NAME.

Without sampling settings, those of the model's generation config hold; if it has none, the most
likely token is taken each time. One of --temperature, --top-p and --top-k turns sampling on."""

CHAT = """\
Chat with a model in the terminal: the adapter of a run on its base model, or a merged model. The
answer appears while it is written; Ctrl-C stops it, not the chat. /help lists the commands, such
as /adapter NAME, which lets another adapter answer, or `base` the base model without one.

  petl chat RUN
  petl chat RUN --adapter other=RUN2 --temperature 0.7

Settings of sampling are those of `petl generate`."""


# Shared by both


def load(arguments: argparse.Namespace) -> "LanguageModel":
    """Load the model of a command."""
    from petl.generation.inference.loading import load_language_model

    # dict() would keep the last one without a message
    names = [name for name, _ in arguments.adapter]
    if len({*names}) < len(names):
        raise InputError(f"--adapter names {max(names, key=names.count)!r} twice")
    model = load_language_model(
        arguments.run,
        dict(arguments.adapter),
        plain=arguments.plain,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
        drafting=arguments.drafter,
    )
    if arguments.drafter != "auto":
        with model.using(model.names[0]):
            _ = model.drafter  # one that cannot be used is refused before the first answer
    return model


def sampling_of(arguments: argparse.Namespace) -> "Sampling":
    """Return the settings of sampling of a command, and seed the random numbers."""
    from transformers import set_seed

    from petl.generation.inference.sampling import SETTINGS, Sampling

    set_seed(arguments.seed)
    given = {name: getattr(arguments, name) for name in SETTINGS}
    return Sampling(**given, stop=tuple(arguments.stop))


# petl generate


def generate(arguments: argparse.Namespace) -> None:
    """Answer the prompts; print the answers, or write them to a file."""
    if arguments.out is not None:
        from petl.generation.prediction.files import Output

        read = [] if arguments.file is None else [arguments.file]
        Output(arguments.out).check(read)  # before the model is loaded
    sampling = sampling_of(arguments)
    batch_size = _batch_size(arguments)
    model = load(arguments)
    # the last name is that of the base model, see `LanguageModel.names`
    names = [*model.adapters] or [model.names[-1]]
    if arguments.base and model.adapters:
        names.append(model.names[-1])
    if arguments.check:
        _check_drafts(model, names, next(_questions(arguments, model)).prompt, arguments.system)
    if arguments.file is None and arguments.out is None:
        stats = _print_answers(arguments, model, sampling, names)
    else:
        stats = _write_answers(arguments, model, sampling, names, batch_size)
    if arguments.stats:
        _tell_stats(model, stats)


def _batch_size(arguments: argparse.Namespace) -> int:
    """Return how many prompts of a file, or with --out, are answered together.

    Raises:
        InputError: several are asked for with a setting that is for one at a time.
    """
    single = {
        "--stats": arguments.stats,
        f"--drafter {arguments.drafter}": arguments.drafter not in ("auto", "none"),
        "--prompt-lookup": arguments.prompt_lookup is not None,
    }
    reason = next((name for name, is_given in single.items() if is_given), "")
    if reason and (arguments.batch_size or 1) > 1:
        raise InputError(
            f"--batch-size={arguments.batch_size} with {reason}, which is for one prompt at a "
            "time: leave out one of them"
        )
    return 1 if reason else arguments.batch_size or BATCH


def _check_drafts(
    model: "LanguageModel", names: list[str], prompt: "Prompt", system: str | None
) -> None:
    """Check passes over several tokens, and an answer with drafts, with each adapter."""
    from petl.efficiency.drafting import PROMISE, check_answer, verify

    ids = model.encode(prompt, system)
    for name in names:
        with model.using(name):
            gap = verify(model.model)
            below = check_answer(model.model, ids, model.drafter or "free")
        title = _title(model, name)
        logger.info("%s: logits with drafts differ by at most %.1e", title, gap)
        logger.info("%s: tokens of an answer are at most %.1e below the best", title, below)
    logger.info(PROMISE)


def _tell_stats(model: "LanguageModel", stats: "Stats") -> None:
    """Log what drafts saved, against the passes of plain decoding at their measured time."""
    from petl.efficiency.drafting import Costs

    if not stats.passes:
        logger.info("no answer was decoded with drafts")
        return
    # what `generate` does between passes comes on top
    plain = Costs.measure(model.base, counts=(1,)).seconds[1] * (stats.tokens - stats.answers)
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
    arguments: argparse.Namespace, model: "LanguageModel", sampling: "Sampling", names: list[str]
) -> "Stats":
    """Print the answers to `--prompt` while they are written; return what drafts did."""
    from petl.efficiency.drafting import Stats

    stats = Stats()
    for prompt in _prompts(arguments):
        ids = model.encode(prompt, arguments.system)
        for name in names:
            if len(names) > 1:
                show(f"[{_title(model, name)}]\n")
            with model.using(name):
                (answer,) = model.answer([ids], sampling, write=show, stats=stats)
            # an empty line between the answers of several adapters
            show("\n" * (1 + (len(names) > 1)))
            tell_if_cut(answer)
    return stats


def _prompts(arguments: argparse.Namespace) -> list[str]:
    # kept: standard input can be read once only
    readers = [sys.stdin.read if each == "-" else partial(str, each) for each in arguments.prompt]
    arguments.prompt = [text_of(read) for read in readers]
    return arguments.prompt


def _title(model: "LanguageModel", name: str) -> str:
    return f"{name}: {model.adapters[name]}" if name in model.adapters else f"{name}: {model.name}"


def _write_answers(
    arguments: argparse.Namespace,
    model: "LanguageModel",
    sampling: "Sampling",
    names: list[str],
    batch_size: int,
) -> "Stats":
    """Write the answers as JSON lines, to `--out` or to standard output."""
    from petl.efficiency.drafting import Stats
    from petl.generation.inference import prompts
    from petl.generation.prediction.tables import as_line, new_table
    from petl.system.progress import Pass

    of = "the prompts" if arguments.file is None else printable(arguments.file)
    # before the first answer: an error in a later prompt would discard those before it
    prompts.check_prompts(model, _questions(arguments, model), arguments.system)
    stats = Stats()
    shown = Pass(f"answering {of}", None, unit="answers", prints=arguments.out is None)
    answers = prompts.answered(
        model,
        _questions(arguments, model),
        sampling,
        names=names,
        system=arguments.system,
        batch_size=batch_size,
        stats=stats,
        count=shown.advance,
    )
    # lazy: an answer is written while later ones are not computed yet
    records = (_record(question.row, found) for question, found in answers)
    if arguments.out is None:
        with shown:
            for record in records:
                show(f"{as_line(record)}\n")
        return stats
    with shown, new_table(arguments.out) as table:
        for record in records:
            table.write([record])
    logger.info("%d answers in %s", shown.done, arguments.out)
    return stats


def _questions(arguments: argparse.Namespace, model: "LanguageModel") -> Iterator["Question"]:
    """The prompts with the rows that they are from: those of the file, or of --prompt."""
    from petl.generation.inference.prompts import Question, read_prompts

    if arguments.file is not None:
        return read_prompts(arguments.file, model, system=arguments.system)
    # as rows of a file with the column prompt
    return (Question({"prompt": prompt}, prompt) for prompt in _prompts(arguments))


def _record(row: Mapping[str, Any], found: Mapping[str, "Answer"]) -> dict[str, Any]:
    """A row with its answers: that of the first adapter, and others by name."""
    first, *others = found  # in the order of `names`
    more = {f"generated_{name}": found[name].text for name in others}
    return {**row, "generated": found[first].text, **more}


# petl chat


def chat(arguments: argparse.Namespace) -> None:
    """Chat until the end of the input."""
    from petl.cli.chat_commands import run
    from petl.generation.inference.chat import Chat

    sampling = sampling_of(arguments)
    model = load(arguments)
    # names[0]: the first adapter, if there is one
    adapter = model.names[-1] if arguments.base else model.names[0]
    run(Chat(model, sampling, adapter, arguments.system))


COMMANDS = {"generate": generate, "chat": chat}
