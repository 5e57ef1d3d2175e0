"""The command `petl advise`: which method, rank and rate, within the cost of a few runs."""

import inspect
import signal
from types import FrameType
from typing import NoReturn

from petl.cli.commands import composed
from petl.cli.table import AdviseOptions
from petl.errors import InputError, RunStopped
from petl.system.processes import claimed, refuse_processes
from petl.system.settings.command_line import how_to_continue
from petl.training.program import SIGNALLED

# groups that the command does not take, and why
REFUSED = {
    "method": "petl advise tries several methods, each with the fields of its own YAML",
    "loss": "petl advise tries methods without a further loss",
    "ranks": "petl advise gives all layers one rank",
    "launch": "petl advise trains in one process",
}
# settings under `train` that it chooses itself
CHOSEN = (
    *("lr", "find_lr", "budget", "eval_steps", "validation_share", "early_stopping", "test"),
    *("seed", "run", "output", "resume", "init_from", "together", "linear_probe", "score_before"),
)


def advise(options: AdviseOptions) -> None:
    """Try settings, print the advice, and write its page.

    Raises:
        InputError: a setting that the command chooses, or as `Advisor.run`.
        RunStopped: a signal ended it, or as `Advisor.run`.
    """
    for word in options.overrides:
        problem = refusal(word.lstrip("+~").partition("=")[0])
        if problem:
            raise InputError(f"{word}: {problem}")
    refuse_processes("petl advise trains in one process; start it without torchrun")
    composed(["+method=lora", *options.overrides])
    from petl.cli.train import train, trial
    from petl.experiments.advice.advisor import AdviceRequest, Advisor
    from petl.experiments.reports.advised import print_advice, write_page

    request = AdviceRequest(
        options.overrides,
        options.out,
        options.cost,
        options.need,
        options.bytes,
        options.lost,
        options.seconds,
    )
    signal.signal(signal.SIGTERM, _terminated)
    with claimed(options.out):
        try:
            # without what reports errors, which a run does itself
            advice = Advisor(request, trial, inspect.unwrap(train)).run()
        except KeyboardInterrupt as error:
            raise RunStopped(f"interrupted; {how_to_continue()}", status=130) from error
        write_page(advice, options.out)
    print_advice(advice, options.out)


def refusal(key: str) -> str:
    """Return why the command does not take a setting, and what to do; "": it does."""
    group, _, name = key.partition(".")
    if key in ("train", "retain"):
        return f"name settings one by one, as {key}.NAME=VALUE; petl advise sets some of them"
    if group == "retain" and name in ("limit", "curve"):
        return "petl advise measures other texts once, after a run; --lost limits what is lost"
    is_chosen = key == "method" or (group == "train" and name in CHOSEN)
    why = f"petl advise chooses {key}" if is_chosen else REFUSED.get(group)
    return "" if why is None else f"{why}; leave it out, or compare what you name by petl study"


def _terminated(number: int, frame: FrameType | None) -> NoReturn:
    raise RunStopped(f"terminated; {how_to_continue()}", status=SIGNALLED + number)
