"""The commands of `petl`: they print what other modules find out. Arguments are petl_cli.py's."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from petl.cli import app
from petl.config.compose import add_config_dir, compose
from petl.errors import RunStopped
from petl.reports.formatting import print_table, size

if TYPE_CHECKING:
    from petl.export.export import Written
    from petl.export.saved_adapter import Saved
    from petl.planning.memory import Memory

SAME = 1e-6  # by which scores of the same adapter may differ, relative above 1


def run(arguments: argparse.Namespace) -> int:
    """Run a parsed command; its exit status."""
    app.log_to_stderr()
    command = COMMANDS[arguments.command]
    if command is not methods:  # it reads a file, and transformers takes a second to import
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()

    def stoppable() -> None:
        if getattr(arguments, "config_dir", None) is not None:
            add_config_dir(arguments.config_dir)
        try:
            command(arguments)
        except KeyboardInterrupt as error:
            raise RunStopped("interrupted", status=130) from error

    return app.reported(stoppable)


# petl methods, petl show


def methods(arguments: argparse.Namespace) -> None:
    from petl.catalog.listing import listing

    for table in listing():
        print_table(table.columns, table.rows, table.title)
        for note in table.notes:
            print(note)
        print()
    print("petl show NAME explains one and its fields; petl plan counts on your own model")


def show(arguments: argparse.Namespace) -> None:
    from petl.catalog.method_page import page_of

    page = page_of(arguments.name)
    if arguments.field:
        field = page.field(arguments.field)
        print(f"{page.name}.{field.name}: {field.type}, default {field.default}")
        if field.preset is not None:
            print(f"{page.file} sets {field.preset}")
        print(field.meaning)
        return
    print(f"{page.name}: {page.summary}")
    print(f"paper: {page.paper}")
    for fact in page.facts:
        print(fact)
    print()
    if any(field.preset is not None for field in page.fields):
        rows = [(f.name, f.type, f.default, f.preset or "", f.gist) for f in page.fields]
        print_table(("field", "type", "default", "in the YAML", "meaning"), rows)
    else:
        rows = [(f.name, f.type, f.default, f.gist) for f in page.fields]
        print_table(("field", "type", "default", "meaning"), rows)
    if page.more:
        print(page.more)
    if any(field.gist != field.meaning for field in page.fields):
        print(f"petl show {page.name} FIELD tells the rest of a meaning")


# petl plan


def plan(arguments: argparse.Namespace) -> None:
    from petl.planning.plan import plan_run

    found = plan_run(compose(arguments.overrides))
    print(" · ".join(found.names), end="\n\n")
    rows = [(t.pattern, t.modules, " x ".join(map(str, t.shape)), t.example) for t in found.targets]
    print_table(("target", ">modules", "weight", "such as"), rows)
    print()
    trained = sum(group.parameters for group in found.groups)
    rows = [(g.role, g.tensors, f"{g.parameters:,}", f"{g.lr:g}") for g in found.groups]
    rows.append(("together", sum(g.tensors for g in found.groups), f"{trained:,}", ""))
    print_table(("trained", ">tensors", ">parameters", ">peak rate"), rows)
    print(
        f"{100 * trained / found.parameters:.3f} % of {found.parameters:,} parameters are trained"
    )
    print(f"adapter file: {found.saved:,} numbers, {found.file_bytes:,} bytes", end="\n\n")
    print_memory(found.memory)
    length = found.length
    print(f"\nrun: {length.steps:,} steps, {length.warmup:,} of them warm-up;", end=" ")
    padding = f", {100 * length.padding:.1f} % of the positions padding" if length.padding else ""
    print(f"{length.epochs:.2f} epochs of {length.rows:,} rows;", end=" ")
    print(f"{length.amount:,} {length.unit}{padding}\n")
    print_table(("with this adapter", ""), found.supports.items())
    for note in found.notes:
        print(f"note: {note}")


def print_memory(memory: "Memory") -> None:
    passed = memory.pass_
    rows = [
        ("weights", size(memory.weights), "base model, adapter, head"),
        ("optimizer", size(memory.optimizer), "AdamW's two moments, float32"),
    ]
    if memory.gradients:
        rows.append(("gradients", size(memory.gradients), "of earlier micro-batches"))
    if memory.unfolded:
        what = "weights that a pass makes dense, or puts together, at a time"
        rows.append(("unfolded", size(memory.unfolded), what))
    if passed is not None:
        longest = f" of the longest rows, {memory.tokens} tokens each"
        what = f"forward and backward, {memory.rows}{longest if memory.tokens else ' rows'}"
        rows.append(("one pass", size(passed.peak), f"{what}; its peak, gradients included"))
        rows.append(("together", size(memory.fixed + passed.peak), ""))
    print_table(("memory of a step", ">size", ""), rows)
    if passed is None:
        print(f"the pass itself is not estimated: {memory.unknown}")
    else:
        print("measured on tensors without data; Python, torch and the allocator come on top")


# petl data


def data(arguments: argparse.Namespace) -> None:
    from petl.planning import preview

    found = preview.preview(compose(arguments.overrides), arguments.examples)
    print(found.title, end="\n\n")
    print_table(*preview.sizes(found))
    for columns, rows in preview.truths(found):
        print()
        print_table(columns, rows)
    console = Console(highlight=False, soft_wrap=True)
    print(f"\n{preview.legend(found, colour=console.is_terminal)}")
    for text in preview.shown(found, colour=console.is_terminal):
        console.print()
        console.print(text)


# petl eval, merge, export


def found(arguments: argparse.Namespace) -> "Saved":
    """What is saved at RUN."""
    from petl.export.saved_adapter import find

    return find(arguments.run, trust_remote_code=arguments.trust_remote_code)


def evaluate(arguments: argparse.Namespace) -> None:
    from petl.export.saved_adapter import read_scores, score

    saved = found(arguments)
    now = score(saved)
    then = read_scores(saved.run) if saved.run else {}
    rows = [(k, exactly(k, now[k]), exactly(k, then[k]) if k in then else "") for k in now]
    print_table(("score", ">now", ">scores.json"), rows)
    apart = [k for k in now if k in then and abs(then[k] - now[k]) > SAME * max(1, abs(then[k]))]
    if apart:
        print(f"not as in scores.json: {', '.join(apart)}; another device, precision or version?")


def exactly(name: str, value: float) -> str:
    """A score with more digits than elsewhere; a count as it is."""
    from petl.reports.summary import COUNTS, shown

    return shown(name, value) if name in COUNTS else f"{value:.6f}"


def merge(arguments: argparse.Namespace) -> None:
    from petl.export.export import merge as write

    saved = found(arguments)
    saved = saved.in_dtype(arguments.dtype) if arguments.dtype else saved
    written = write(saved, Path(arguments.out), arguments.tolerance)
    report(written, "merged model")
    difference = written.difference
    if difference is not None and difference.relative > difference.effect / 2:
        print("rounding takes much of it away; --dtype float32 merges without")


def export(arguments: argparse.Namespace) -> None:
    from petl.export.export import export_lora

    written = export_lora(found(arguments), Path(arguments.out), arguments.tolerance)
    report(written, "plain LoRA")


def report(written: "Written", what: str) -> None:
    """Print what was written and how its outputs compare."""
    print(f"{what} in {written.folder}, {size(written.bytes)}")
    difference = written.difference
    if difference is None:
        print("a copy: the adapter is PEFT's own LoRA")
        return
    print(f"outputs differ by {difference.relative:.1e} of their norm,", end=" ")
    print(f"{difference.largest:.1e} at most;", end=" ")
    print(f"{100 * difference.same:.1f} % have the same highest logit")
    print(f"for comparison: the adapter itself changes them by {difference.effect:.1e}")


# petl report, petl compare


def write_report(arguments: argparse.Namespace) -> None:
    from petl.reports.run_report import write_page

    print(write_page(Path(arguments.run)))


def compare(arguments: argparse.Namespace) -> None:
    from petl.reports import comparison, comparison_report

    found = comparison.compare(map(Path, arguments.runs), arguments.baseline)
    for i, each in enumerate(found):
        if len(found) > 1:
            print("\n" * (i > 0) + comparison_report.title_of(each))
        table = comparison_report.results(each)
        first, *others = table.columns
        print_table([first, *(f">{name}" for name in others)], table.rows)
        for sentence in comparison_report.summary(each):
            print(sentence)
    if arguments.out is not None:
        comparison_report.write_page(found, Path(arguments.out))


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "methods": methods,
    "show": show,
    "plan": plan,
    "data": data,
    "eval": evaluate,
    "merge": merge,
    "export": export,
    "report": write_report,
    "compare": compare,
}
