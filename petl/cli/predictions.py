"""The commands `petl predict` and `petl eval`: a saved adapter on files of the user.

Imports what `petl.cli.main` may import; the functions import their modules when they run.
"""

import argparse
from collections.abc import Sequence

from petl.cli.arguments import COUNT, Add, add_run, file_to_write, folder_to_write, number

PROCESSES = number(int, 1, 1024)


def add_parsers(add: Add) -> None:
    """Add the parsers of the commands with `add`."""
    evaluate = add("eval", "evaluate a run's adapter on its test set, or on files", EVAL)
    add_run(evaluate)
    # files need --data here: without any, the test set is evaluated
    evaluate.add_argument(
        "overrides", metavar="data.SETTING", nargs="*", default=[], help="columns of files"
    )
    evaluate.add_argument(
        "--data",
        metavar="FILE",
        nargs="+",
        default=[],
        help="files with labels, or folders of images or sounds, in place of the test set",
    )
    evaluate.add_argument(
        "--out",
        metavar="FOLDER",
        type=folder_to_write,
        help="folder of the results (default: RUN/eval-NAME, by the name of the data)",
    )
    predict = add("predict", "predict the rows of files with a run's adapter", PREDICT)
    add_run(predict)
    # in any order: `split_words` tells them apart
    predict.add_argument(
        "overrides", metavar="FILE", nargs="+", help="files or folders, and data.SETTINGs"
    )
    predict.add_argument(
        "--out",
        metavar="FILE",
        type=file_to_write,
        help="csv, tsv, jsonl or parquet to write (default: JSON lines on standard output)",
    )
    predict.add_argument("--prefix", default="", metavar="NAME_", help="of the added columns")
    predict.add_argument(
        "--processes", type=PROCESSES, metavar="N", help="processes on this machine, one per GPU"
    )
    for command in (evaluate, predict):
        command.add_argument(
            "--max-new-tokens",
            type=COUNT,
            metavar="N",
            help="longest answer of a model that writes",
        )
        command.add_argument("--batch-size", type=COUNT, metavar="N", help="examples per batch")


EVAL = """\
Load the base model and the adapter of a run, and print its scores on its test set next to those
that the run saved in scores.json, or its scores on other data. An adapter file with missing or
unexpected tensors is an error; a base model whose weights are others than in training is a warning.

  petl eval runs/mine
  petl eval runs/mine --data new.csv more.jsonl data.text=review

The files have one of the formats of data=files; data.SETTINGs name their columns if they are others
than in training. Labels are compared by name with those of the run. Scores, predictions, scores by
class, confusion matrix, calibration, and the worst examples are written to a folder, with a page
(index.html)."""

PREDICT = """\
Predict the rows of files, which need no labels, and write them with all of their columns and the
predictions: the label with its probability and those of all labels, a number, a span of the
context, or an answer.

  petl predict runs/mine new.csv --out predicted.csv
  petl predict runs/mine new.jsonl data.text=review > predicted.jsonl
  petl predict runs/images folder --out predicted.csv

Files are csv, tsv, json, jsonl or parquet; the suffix of --out names the format to write. All rows
are checked before the model is loaded, then read, predicted and written in windows, so that files
may be larger than memory (json is read as a whole). data.SETTINGs name columns if they are others
than in training. For images and sounds, FILE is one of them, a folder, or a table with the column
path. With --processes, or under torchrun, several processes divide the rows; the output has the
order of the input."""


def predict(arguments: argparse.Namespace) -> None:
    """Predict the rows of files and write them."""
    # each process runs this command again, without the option
    if (arguments.processes or 1) > 1:
        from petl.generation.prediction.processes import run_in_processes

        run_in_processes(arguments.processes, without_processes(arguments.argv))
        return
    from petl.adapters.export.saved_adapter import find
    from petl.errors import InputError
    from petl.generation.prediction.files import Output, predict_files
    from petl.system.processes import end_with_launcher

    # under torchrun: a process that outlives the launcher would keep its GPU
    end_with_launcher()
    names, settings = split_words(arguments.overrides)
    if not names:
        raise InputError(
            f"no FILE is given beside {' '.join(settings)}: name the files whose rows to predict"
        )
    predict_files(
        find(
            arguments.run,
            trust_remote_code=arguments.trust_remote_code,
            other_base=arguments.other_base,
        ),
        names,
        Output(arguments.out, arguments.prefix),
        settings,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )


def evaluate(arguments: argparse.Namespace) -> None:
    """Print the scores of a saved adapter on data, and write them with their analysis."""
    from petl.adapters.export.saved_adapter import find
    from petl.experiments.reports.evaluation_report import print_evaluation, write_evaluation
    from petl.generation.prediction.evaluation import evaluate_saved, folder_of
    from petl.system.processes import is_first

    saved = find(
        arguments.run,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
    )
    names, settings = split_words([*arguments.data, *arguments.overrides])
    # without --data: RUN/eval-test
    folder = arguments.out or folder_of(saved, names)
    scores = evaluate_saved(
        saved,
        names,
        settings,
        folder,
        batch_size=arguments.batch_size,
        max_new_tokens=arguments.max_new_tokens,
    )
    if not is_first():  # of several processes, one writes and prints
        return
    print_evaluation(saved, scores, names)
    if folder is not None:  # an adapter without a run, and no --out
        write_evaluation(saved, folder, scores, names)


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Divide words into names of files, and settings under `data`."""
    # a file may be called data.csv: settings have an equals sign too
    settings = [word for word in words if word.startswith("data.") and "=" in word]
    return [word for word in words if word not in settings], settings


def without_processes(words: Sequence[str]) -> list[str]:
    """The words of a command line without the option `--processes` and its value."""
    kept, rest = [], iter(words)
    for word in rest:
        if word == "--processes":  # argparse takes both forms
            next(rest, None)
        elif not word.startswith("--processes="):
            kept.append(word)
    return kept


COMMANDS = {"predict": predict, "eval": evaluate}
