"""The terminal side of `petl chat`: lines of the user, which are questions or commands."""

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from petl.cli.answering import show, stopping, tell_if_cut, text_of
from petl.errors import InputError, choose
from petl.experiments.reports.formatting import echo, print_table
from petl.generation.inference.chat import ChatSession
from petl.generation.inference.sampling import SETTINGS
from petl.system.files.disk import append_to

PROMPT = "> "
MARK = "/"  # begins a command
logger = logging.getLogger("petl")


class ChatEnd(Exception):
    """The user ended the chat."""


def run(chat: ChatSession) -> None:
    """Read lines and answer them until the input ends, or `/exit`."""
    kind = "chat template" if chat.model.is_chat else "plain text: each text is continued by itself"
    echo(f"{chat.model.name} with {described(chat)} ({kind})")
    echo("/help lists commands; Ctrl-C stops an answer, Ctrl-D ends the chat")
    _enable_line_editing()
    while True:
        try:
            line = read()
            handle(chat, line)
        except ChatEnd:
            break
        except EOFError:
            echo()  # the shell begins on a new line
            break
        except KeyboardInterrupt:  # at the prompt, or twice in an answer
            echo()
        except InputError as error:
            logger.error("%s", error)


def read() -> str:
    r"""Read a question; a line that ends with a backslash goes on in the next one.

    Raises:
        EOFError: there is none.
        InputError: it is not UTF-8.
    """
    lines = [text_of(lambda: input(PROMPT))]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(text_of(lambda: input("  ")))  # as wide as the prompt
    return "\n".join(lines)


def _enable_line_editing() -> None:
    """Let `input` have a history and editing keys, where Python was built with them."""
    if sys.stdin.isatty():
        try:
            # `input` uses it once it is imported
            import readline  # noqa: F401
        except ImportError:  # on Windows
            return


def handle(chat: ChatSession, line: str) -> None:
    """Answer a question, or obey a command.

    Raises:
        Ended: at `/exit`.
        InputError: there is no such command, or it cannot be obeyed.
    """
    word, _, rest = line.strip().partition(" ")
    if not word:
        return
    # two of them begin a question that starts with one
    if word.startswith(MARK) and not word.startswith(2 * MARK):
        choose(COMMANDS, word, "command")(chat, rest.strip())
    else:
        # a question keeps its indentation
        answer(chat, line.strip().removeprefix(MARK) if word.startswith(MARK) else line)


def answer(chat: ChatSession, text: str) -> None:
    """Print the answer to a question while it is written."""
    with stopping() as stop:
        found = chat.ask(text, show, stop)
    # the answer ends without a line break
    echo(" [stopped]" if found.finish == "interrupted" else "")
    tell_if_cut(found)


# Commands


def show_help(chat: ChatSession, rest: str) -> None:
    """List these commands."""
    print_table(("command", ""), [(USAGES[name], str(f.__doc__)) for name, f in COMMANDS.items()])
    echo("a line that ends with \\ goes on in the next one; // begins a question with a slash")


def set_adapter(chat: ChatSession, rest: str) -> None:
    """List the adapters, or let another one answer; base: the model without one."""
    names = {name: chat.model.adapters.get(name, chat.model.name) for name in chat.model.names}
    if rest:
        choose(names, rest, "adapter")
        chat.adapter = rest
        echo(f"{described(chat)} answers")
    else:
        marks = {chat.adapter: "answers"}
        print_table(("adapter", "", ""), [(n, p, marks.get(n, "")) for n, p in names.items()])


def set_system(chat: ChatSession, rest: str) -> None:
    """Show the system prompt, or set it for all further answers; -: none."""
    if rest and not chat.model.is_chat:
        raise InputError(f"{chat.model.name} reads plain text, without a system prompt")
    if rest:
        # "" means none, where None would mean the system prompt of the run
        chat.system = "" if rest == "-" else rest
    current = chat.model.system if chat.system is None else chat.system
    echo(f"system prompt: {current}" if current else "no system prompt of your own")


def set_sampling(chat: ChatSession, rest: str) -> None:
    """Show the settings of sampling, or change one: /set temperature 0.7; -: the model's."""
    name, _, value = rest.partition(" ")
    if name:
        choose(dict.fromkeys(SETTINGS), name, "setting")
        chat.sampling = replace(chat.sampling, **{name: _parsed(name, value.strip())})
    values = [(name, getattr(chat.sampling, name)) for name in SETTINGS]
    print_table(("setting", ""), [(n, "the model's" if v is None else v) for n, v in values])


def _parsed(name: str, value: str) -> float | int | None:
    if value == "-":
        return None
    try:
        is_integer = name in ("max_new_tokens", "top_k", "prompt_lookup")
        return int(value) if is_integer else float(value)
    except ValueError:
        raise InputError(f"{name}={value} is not a number: /set {name} NUMBER") from None


def retry(chat: ChatSession, rest: str) -> None:
    """Answer the last question again, such as with another adapter."""
    lists = ("turns", "images", "waiting", "ends")
    before = replace(chat, **{name: [*getattr(chat, name)] for name in lists})
    try:
        answer(chat, chat.take_back())
    except BaseException:  # also Ctrl-C
        vars(chat).update(vars(before))
        raise


def reset(chat: ChatSession, rest: str) -> None:
    """Forget all questions and answers."""
    chat.forget()
    echo("the chat begins again")


def save(chat: ChatSession, rest: str) -> None:
    """Append the chat to a .jsonl file, as a row to train on."""
    if not rest.endswith(".jsonl"):
        raise InputError(f"{rest!r} is not the name of a .jsonl file: /save FILE.jsonl")
    if not chat.turns:
        raise InputError(f"there is nothing to save in {rest} yet")
    try:
        file = Path(rest).expanduser()
    except RuntimeError as error:  # ~name of an unknown user
        raise InputError(f"cannot write {rest}: {error}") from error
    # a format of data=files
    row = json.dumps(chat.row(), ensure_ascii=False)
    try:
        with append_to(file) as opened:
            opened.write(f"{row}\n".encode())
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror}") from error
    echo(f"saved in {file}")
    cut = sum(end != "stop" for end in chat.ends)
    if cut:
        echo(f"{cut} of {len(chat.ends)} answers were cut or stopped: complete them in the file")


def add_image(chat: ChatSession, rest: str) -> None:
    """Let the next question begin with an image, or with several; without PATH: list them."""
    if rest:
        chat.show(rest)
    for path in chat.waiting:
        echo(f"the next question is about {path}")


def end(chat: ChatSession, rest: str) -> None:
    """End the chat."""
    raise ChatEnd


def described(chat: ChatSession) -> str:
    """The adapter that answers, in words."""
    folder = chat.model.adapters.get(chat.adapter)
    return f"adapter {chat.adapter} ({folder})" if folder else "no adapter"


COMMANDS: dict[str, Callable[[ChatSession, str], None]] = {
    "/adapter": set_adapter,
    "/system": set_system,
    "/set": set_sampling,
    "/image": add_image,
    "/retry": retry,
    "/reset": reset,
    "/save": save,
    "/help": show_help,
    "/exit": end,
}
# commands that take no argument are their own usage
USAGES = {name: name for name in COMMANDS} | {
    "/adapter": "/adapter [NAME]",
    "/system": "/system [TEXT]",
    "/set": "/set [NAME VALUE]",
    "/image": "/image [PATH]",
    "/save": "/save FILE",
}
