"""Commands of `petl` that print what other modules compute.

Commands import their modules when they run: most of them need torch and PEFT, which take seconds.
"""

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from petl.cli.catalog.names import look_up
from petl.cli.table import (
    CompareOptions,
    DataOptions,
    ExportOptions,
    MergeOptions,
    MethodsOptions,
    PlanOptions,
    ReportOptions,
    ShowOptions,
)
from petl.errors import InputError, RunStopped
from petl.experiments.reports.formatting import count_text, duration, echo, print_table, size
from petl.training.compose import compose
from petl.training.runs.lookup import look_for_scores

if TYPE_CHECKING:
    from petl.adapters.export.checked_folder import OutputFolder
    from petl.experiments.planning.memory import Memory
    from petl.experiments.reports.answers import Differences
    from petl.experiments.reports.entries import RunResult

logger = logging.getLogger("petl")


# petl methods, petl show


def methods(options: MethodsOptions) -> None:
    """Print the tables of methods, losses and recipes."""
    from petl.cli.catalog.listing import listing

    for table in listing():
        print_table(table.columns, table.rows, table.title)
        for note in table.notes:
            echo(note)
        echo()
    echo("`petl show NAME` describes one and its fields; `petl plan` counts on your own model")


def show(options: ShowOptions) -> None:
    """Print the page of a method, loss or recipe, or one field of it."""
    look_up(options.name, options.field)
    from petl.cli.catalog.method_page import page_of

    page = page_of(options.name)
    if options.field:
        field = page.field(options.field)
        echo(f"{page.name}.{field.name}: {field.type}, default {field.default}")
        if field.preset is not None:
            echo(f"{page.file} sets {field.preset}")
        echo(field.meaning)
        return
    echo(f"{page.name}: {page.summary}")
    echo(f"paper: {page.paper}")
    for fact in page.facts:
        echo(fact)
    echo()
    if any(field.preset is not None for field in page.fields):
        rows = [(f.name, f.type, f.default, f.preset or "", f.gist) for f in page.fields]
        print_table(("field", "type", "default", "in the YAML", "meaning"), rows)
    else:
        rows = [(f.name, f.type, f.default, f.gist) for f in page.fields]
        print_table(("field", "type", "default", "meaning"), rows)
    if page.more:
        echo(page.more)
    if any(field.gist != field.meaning for field in page.fields):
        echo(f"`petl show {page.name} FIELD` prints the full description")


# petl plan


def composed(overrides: Sequence[str]) -> DictConfig:
    """Return the settings of a run, of which what needs no torch is checked."""
    cfg = compose(overrides)
    resolve_name("petl.training.runs.early:read_early")(cfg)  # other commands read no data
    return cfg


def plan(options: PlanOptions) -> None:
    """Print targets, parameters, memory, length and capabilities of a run."""
    cfg = composed(options.overrides)
    from petl.experiments.planning.plan import plan_run

    planned = plan_run(cfg)
    echo(" · ".join(planned.names), end="\n\n")
    rows = [(t.name, t.modules, " x ".join(map(str, t.shape)), t.example) for t in planned.targets]
    # ">" aligns a column to the right
    print_table(("target", ">modules", "weight shape", "example"), rows)
    echo()
    trained = sum(group.parameters for group in planned.groups)
    rows = [(g.role, g.tensors, f"{g.parameters:,}", f"{g.lr:g}") for g in planned.groups]
    rows.append(("total", sum(g.tensors for g in planned.groups), f"{trained:,}", ""))
    print_table(("trainable", ">tensors", ">parameters", ">peak learning rate"), rows)
    percent = 100 * trained / planned.parameters  # of base model, adapter and head
    echo(f"trainable parameters: {trained:,} of {planned.parameters:,} ({percent:.3f} %)")
    echo(f"adapter file: {planned.saved:,} values, {planned.file_bytes:,} bytes", end="\n\n")
    print_memory(planned.memory)
    length = planned.length
    echo(f"\nrun: {length.steps:,} steps, including {length.warmup:,} warm-up steps;", end=" ")
    padding = f", {100 * length.padding:.1f} % of the positions padding" if length.padding else ""
    echo(f"{length.epochs:.2f} epochs of {length.rows:,} examples;", end=" ")
    echo(f"{length.amount:,} {length.unit}{padding}")
    if planned.time is not None:
        echo(f"time, about: {duration(planned.time.steps)} for the steps,", end=" ")
        if planned.time.filling:
            echo(f"{duration(planned.time.filling)} for the store,", end=" ")
        echo(f"{duration(planned.time.scoring)} for each evaluation of the test examples;", end=" ")
        echo("from the matrix products, at the speed that this machine has now")
    if planned.frozen is not None:
        echo(f"frozen: {planned.frozen}")
    if planned.precision:
        echo(f"precision: {planned.precision}")
    echo()
    if planned.cheaper:
        rows = [(saving.setting, saving.saves, saving.result) for saving in planned.cheaper]
        print_table(("cheaper with", "saves", "result"), rows)
        echo()
    print_table(("this adapter supports", ""), planned.supports.items())
    if planned.coverage is not None:
        echo(str(planned.coverage))
    for note in planned.notes:
        echo(f"note: {note}")


def print_memory(memory: "Memory") -> None:
    """Print the table of the memory of a training step."""
    peak = memory.pass_  # None: it could not be estimated
    rows = [
        ("weights", size(memory.weights), "base model, adapter, head"),
        ("optimizer", size(memory.optimizer), f"{memory.optimizer_state}, float32"),
    ]
    if memory.gradients:
        rows.append(("gradients", size(memory.gradients), "of earlier micro-batches"))
    if memory.unfolded:
        meaning = "weights that are dequantized or gathered at the same time"
        rows.append(("temporary weights", size(memory.unfolded), meaning))
    if peak is not None:
        length = f", {memory.tokens} tokens each" if memory.tokens else ""
        meaning = f"peak of forward and backward, {memory.rows} longest examples{length}"
        rows.append(("one pass", size(peak.peak), f"{meaning}; including gradients"))
        rows.append(("total", size(memory.fixed + peak.peak), ""))
    if memory.scoring_total is not None:
        length = f", {memory.scoring_tokens} tokens each" if memory.scoring_tokens else ""
        meaning = f"total in an evaluation, {memory.scoring_rows} longest test examples{length}"
        rows.append(("evaluation", size(memory.scoring_total), meaning))
    print_table(("memory of a step", ">size", ""), rows)
    if peak is None:
        echo(f"the pass is not estimated: {memory.unknown}")
    else:
        echo("estimated from tensor shapes, without the overhead of Python, torch and allocator")


# petl data


def data(options: DataOptions) -> None:
    """Print sizes, labels and examples of the training data."""
    cfg = composed(options.overrides)
    from petl.experiments.planning import preview
    from petl.experiments.planning.early_preview import preview_early

    count = options.examples
    names_model = any(re.match(r"\+{0,2}model[.=]", word) for word in options.overrides)
    early = preview_early(cfg, count, names_model=names_model)  # without torch
    result = early or preview.preview(cfg, count)
    echo(result.title, end="\n\n")
    print_table(*preview.size_table(result))
    if result.overlap is not None and result.overlap.rows:
        echo(f"\n{result.overlap}")
    for columns, rows in preview.label_tables(result):
        echo()
        print_table(columns, rows)
    console = Console(highlight=False, soft_wrap=True)  # the terminal wraps, so text can be copied
    echo(f"\n{preview.legend(result, color=console.is_terminal)}")
    for text in preview.example_texts(result, color=console.is_terminal):
        console.print()
        console.print(text)


# petl merge, export


def merge(options: MergeOptions) -> None:
    """Merge an adapter into its base model, and print how the outputs compare."""
    from petl.adapters.export.merge import merge as write
    from petl.experiments.reports.differences import NOTHING, print_written

    saved = options.find()
    saved = saved.in_dtype(options.dtype) if options.dtype else saved
    written = write(saved, options.out, options.tolerance)
    print_written(written, "merged model")
    difference = written.difference
    if difference.effect < NOTHING:
        heads = (
            ""
            if not getattr(saved.config, "modules_to_save", None)
            else ", but for its trained head"
        )
        below = saved.settings["model"].get("adapter")
        with_below = "" if below is None else f" with model.adapter={below} merged into it"
        echo(f"WARNING: the merged model is the base{with_below}{heads}")
    # in bfloat16, small updates round to nothing
    if difference.relative > difference.effect / 2:  # assumption: half of it is too much
        echo("rounding removes much of the adapter's effect; --dtype float32 merges without loss")


def export(options: ExportOptions) -> None:
    """Write an adapter in another format, and print how the outputs compare."""
    if options.format == "vllm":  # of a drafter, whose model is another folder
        from petl.generation.inference.draft_export import export_drafter

        given = {name: getattr(options, name) for name in ("tolerance", "trust_remote_code")}
        for line in export_drafter(options.run, options.out, **given):
            echo(line)
        return
    from petl.experiments.reports.differences import print_written

    write, name, use = _export_format(options.format, options.engine)
    written = write(options.find(), options.out, options.tolerance)
    print_written(written, name)
    for line in use(written.folder):
        echo(line)


def _export_format(
    name: str, engine: str | None
) -> tuple[Callable[..., "OutputFolder"], str, Callable[[Path], Iterable[str]]]:
    """Return the function that writes a format, what it writes, and how that is used."""
    if engine is not None and name != "lora":
        raise InputError(f"--engine {engine} is for --lora, not for --{name}; leave it out")
    # gguf and onnx need extras: only the chosen format is imported
    if name == "gguf":
        from petl.adapters.export.gguf import USE, export_gguf

        return export_gguf, "GGUF adapter", lambda out: [USE.format(out=out)]
    if name == "onnx":
        from petl.adapters.export.onnx import export_onnx

        return export_onnx, "ONNX model", lambda out: []
    if name == "small":
        from petl.adapters.export.small import USE, export_small

        return export_small, "small model", lambda out: [USE.format(out=out)]
    from petl.adapters.export.engines import serving_lines
    from petl.adapters.export.lora import export_for_vllm, export_lora

    write = export_lora if engine is None else export_for_vllm
    return write, "plain LoRA", partial(serving_lines, for_vllm=engine == "vllm")


# petl report, petl compare


def write_report(options: ReportOptions) -> None:
    """Write the report of a run, and print its path."""
    from petl.experiments.reports.run_report import write_page

    echo(write_page(Path(options.run)))


def compare(options: CompareOptions) -> None:
    """Print, and with --out write, a comparison of finished runs.

    Raises:
        RunStopped: at the end, if a run or folder was left out, with status 1.
    """
    look_for_scores(options.runs)
    from petl.experiments.reports import comparison, comparison_report
    from petl.experiments.reports.find_runs import find_runs

    found = find_runs(map(Path, options.runs))
    # before anything is printed, since it may refuse the runs
    answers = _answers(options, found.runs) if options.answers else None
    comparisons = comparison.compare_runs(found.runs, options.baseline)
    for i, each in enumerate(comparisons):
        if len(comparisons) > 1:
            echo("\n" * (i > 0) + comparison_report.title_of(each))
        comparison_report.results(each).print()
        for sentence in comparison_report.summary(each):
            echo(sentence)
    if answers is not None:
        print_answers(answers)
    if options.out is not None:
        comparison_report.write_page(comparisons, options.out, answers=answers)
    # at the end, where it is not scrolled away
    for problem in found.left_out:
        logger.warning("left out: %s", problem)
    if found.left_out:
        # some runs are not in the tables, such as those without test scores
        compared = sum(len(each.runs) for each in comparisons)
        raise RunStopped(f"compared {count_text(compared, 'run')}; left out: {len(found.left_out)}")


def _answers(options: CompareOptions, runs: list["RunResult"]) -> "Differences":
    """Compare the predictions of the two runs, in the order in which they were named."""
    from petl.experiments.reports.answers import compare_answers

    if len(runs) != 2:
        raise InputError(f"--answers compares two runs, and here are {len(runs)}: name two")
    first, second = (run.path for run in runs)
    # `find_runs` sorts by path; a run may be named by a folder above it
    named = Path(options.runs[0])
    if second.is_relative_to(named) and not first.is_relative_to(named):
        first, second = second, first
    return compare_answers(first, second, options.examples)


def print_answers(answers: "Differences") -> None:
    """Print where the predictions of two runs differ."""
    echo()
    answers.table().print()
    for sentence in answers.sentences():
        echo(sentence)
    for title, table in answers.tables().items():
        echo()
        print_table(table.columns, table.rows, title)
