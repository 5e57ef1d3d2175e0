"""Rules about tokenizer and chat template: vocabulary, template, stop."""

import re
from collections.abc import Iterator, Mapping
from typing import NoReturn

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import (
    CONFIG,
    TEMPLATE,
    TOKENIZER,
    Subject,
    read_tokenizer,
    template_in,
)
from petl.data.tasks.chat_template import MAX_LENGTH, check_template, within_deadline
from petl.errors import InputError, first_line, shown
from petl.system.files.read import read_text

NO_ROWS = "no rows given: --data FILE"
ANSWER = "petl-check-answer"  # no template has this text itself
CHAT = [
    {"role": "user", "content": "petl-check-question"},
    {"role": "assistant", "content": ANSWER},
]
# as templates of models for images and text take the contents
IN_PARTS = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in CHAT]
EMBEDDING = re.compile(
    r"\.(embed_tokens|wte|embed_in|word_embeddings|shared)(\.base_layer)?\.weight$"
)
GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")  # of transformers, not jinja's


# vocabulary


def rows_of(subject: Subject) -> int:
    """Return the rows of the embedding: the adapter's own, or else those of the base."""
    try:
        stored = subject.weights.stored
    except NotCheckedError:
        stored = {}
    saved = [s.shape[0] for n, s in stored.items() if EMBEDDING.search(n) and len(s.shape) == 2]
    rows = saved[0] if saved else subject.of_base.get("vocab_size")
    if rows is None:
        raise NotCheckedError(f"the config of {subject.base or 'the base'} has no vocab_size")
    return rows


def more_tokens(subject: Subject) -> Iterator[Found]:
    """Tokens of the tokenizer that no row of the embedding has, and none that was trained."""
    added, rows, trained = subject.added, rows_of(subject), trained_rows(subject)
    beyond = sorted(number for number in added if number >= rows and number not in trained)
    if beyond:
        what = f"{len(beyond)} tokens from {shown(added[beyond[0]])} (id {beyond[0]})"
        yield Found(f"{what} are beyond the {rows:,} rows of the embedding", TOKENIZER)


def tokens_beyond(subject: Subject) -> Iterator[Found]:
    """Trained rows that neither the base has nor the tokenizer a token for."""
    rows, trained = rows_of(subject), trained_rows(subject)
    beyond = sorted(i for i in trained if i < 0 or (i >= rows and i not in subject.added))
    if beyond:
        what = f"trainable_token_indices has {beyond[0]}"
        yield Found(f"{what}, and the embedding has {rows_of(subject):,} rows", CONFIG)


def new_rows(subject: Subject) -> Iterator[Found]:
    """Trained rows of new tokens, for which the table of the base has to grow."""
    rows, trained = rows_of(subject), trained_rows(subject)
    new = sorted(i for i in trained if i >= rows and i in subject.added)
    if new:
        what = f"{len(new)} new tokens from {shown(subject.added[new[0]])} (id {new[0]})"
        yield Found(f"{what} have trained rows, and the base has {rows:,}", CONFIG)


def trained_rows(subject: Subject) -> set[int]:
    """Return the tokens whose rows the adapter has."""
    given = subject.config.get("trainable_token_indices") or []
    return {*given} if isinstance(given, list) else {i for each in given.values() for i in each}


# template


def no_template(subject: Subject) -> Iterator[Found]:
    """A chat was trained, and no template was saved with it."""
    if subject.has(TEMPLATE) or (subject.has(TOKENIZER) and subject.template):
        return
    if subject.rows is None:
        raise NotCheckedError(NO_ROWS)
    chats = [row for row in subject.rows if is_chat(row)]
    if chats:
        what = f"{len(chats)} of {len(subject.rows)} rows are chats"
        yield Found(f"{what}, and the folder has no template", subject.name)


def is_chat(row: Mapping[str, object]) -> bool:
    """Return True if a row has a list of turns."""
    turns = row.get("messages", row.get("conversations"))
    return isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)


def other_template(subject: Subject) -> Iterator[Found]:
    """A template that differs from the base's: who reads the base's folder gets another prompt."""
    if not needs_template(subject):
        return
    file, config = subject.beside(TEMPLATE), subject.beside(TOKENIZER)
    if file is not None:
        bases = read_text(file)
    elif config is not None:
        bases = template_in(read_tokenizer(config))
    else:
        raise NotCheckedError(f"the base's {TOKENIZER} is not on this machine: give --base")
    if bases.strip() != subject.template.strip():
        what = "differs from the base's" if bases else "is one that the base does not have"
        yield Found(f"the chat template {what}: it was trained with this one", TEMPLATE)


def needs_template(subject: Subject) -> str:
    """Return the template of the folder; "": none is asked for.

    Raises:
        NotCheckedError: there is none.
    """
    if subject.tokenizer and not subject.template:
        raise NotCheckedError(f"{subject.name} has no chat template")
    return subject.template


def fails(subject: Subject) -> Iterator[Found]:
    """A template that cannot be parsed, or may take hours."""
    template = needs_template(subject)
    try:
        check_template(template, "the chat template")
    except InputError as error:
        yield Found(str(error), TEMPLATE)


def rendered(subject: Subject) -> str:
    """Return a question and its answer as the template of the folder writes them.

    Raises:
        NotCheckedError: it has none, or refuses the two turns.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    template = needs_template(subject)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    names: dict[str, object] = {
        name: subject.special(name) for name in ("bos_token", "eos_token", "pad_token")
    }
    names |= {"raise_exception": refuse, "strftime_now": lambda form: "1 Jan 2026"}

    def render(chat: object = CHAT) -> str:
        compiled = environment.from_string(GENERATION.sub("", template))
        text = ""
        for part in compiled.generate(messages=chat, add_generation_prompt=False, **names):
            text += part
            if len(text) > MAX_LENGTH:
                raise TemplateError(f"it writes more than {MAX_LENGTH:,} characters")
        return render(IN_PARTS) if chat is CHAT and ANSWER not in text else text

    try:
        check_template(template, "the chat template")
        return within_deadline(render, "the chat template")
    except (InputError, TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise NotCheckedError(f"the chat template fails: {first_line(error)}") from error


def two_starts(subject: Subject) -> Iterator[Found]:
    """A template that writes the first token twice."""
    bos = subject.special("bos_token")
    text = rendered(subject)
    if bos and text.startswith(bos * 2):
        yield Found(f"the chat template begins with {bos} twice", TEMPLATE)


def added_start(subject: Subject) -> Iterator[Found]:
    """A template and a tokenizer of which both add the first token."""
    bos = subject.special("bos_token")
    if bos and subject.tokenizer.get("add_bos_token") and rendered(subject).startswith(bos):
        what = f"template and tokenizer both add {bos}: a rendered text that is encoded has two"
        yield Found(what, TEMPLATE)


# stop


def no_stop(subject: Subject) -> Iterator[Found]:
    """The end of an assistant's turn is no token at which generation stops."""
    text = rendered(subject)
    if ANSWER not in text:
        yield Found("the chat template leaves out the assistant's text", TEMPLATE)
        return
    tail = text[text.rindex(ANSWER) + len(ANSWER) :]
    eos = subject.special("eos_token")
    ends = {*subject.added.values(), eos} - {""}
    found = sorted((tail.index(token), -len(token), token) for token in ends if token in tail)
    end = found[0][2] if found else ""
    if eos and (end == eos or (not end and eos in tail)):
        return
    ids = stops(subject)
    if end and end in {subject.added.get(number) for number in ids}:
        return
    names = {subject.added.get(number, f"id {number}") for number in ids} | {eos} - {""}
    stop = ", ".join(sorted(names)) or "no token"
    ending = f"ends turns with {end or shown(tail)}{'' if end else ', no special token'}"
    yield Found(f"the chat template {ending}; generation stops at {stop}", TEMPLATE)


def stops(subject: Subject) -> set[int]:
    """Return the ids at which generation stops, by the generation config or else the config.

    Raises:
        NotCheckedError: neither is on this machine.
    """
    generation = subject.generation()
    given = subject.of_base if generation is None else generation
    ids = given.get("eos_token_id")
    return {number for number in (ids if isinstance(ids, list) else [ids]) if type(number) is int}
