"""The commands `petl predict` and `petl eval`: a saved adapter on files of the user."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from petl.cli.table import EvalOptions, PredictOptions

if TYPE_CHECKING:
    from petl.adapters.export.saved_adapter import SavedAdapter


def predict(options: PredictOptions) -> None:
    """Predict the rows of files and write them."""
    # each process runs this command again, without the option
    processes = options.processes or 1
    if processes > 1:
        from petl.generation.prediction.processes import run_in_processes

        run_in_processes(processes, without_processes(options.words))
        return
    from petl.errors import InputError
    from petl.system.processes import end_with_launcher
    from petl.training.runs.early import look_up_columns

    # under torchrun: a process that outlives the launcher would keep its GPU
    end_with_launcher()
    names, settings = split_words(options.overrides)
    if not names:
        raise InputError(
            f"no FILE is given beside {' '.join(settings)}: name the files whose rows to predict"
        )
    look_up_columns(options.run, names, settings, labels=False)
    # with torch
    from petl.generation.prediction.files import PredictionFile, predict_files

    saved = options.find()
    if options.out is not None and options.out.suffix in (".npy", ".parquet"):
        from petl.generation.prediction.vectors import VectorFile, gives_vectors, write_vectors

        # rows of other tasks are written to parquet with their predictions
        if options.out.suffix == ".npy" or gives_vectors(saved):
            ignored = {"prefix": options.prefix or None, "max-new-tokens": options.max_new_tokens}
            none_of(ignored, "is of predictions, and --out has vectors: leave it out")
            file = VectorFile(
                options.out,
                options.as_ or "document",
                options.dtype or "float32",
                None if options.calibrate is None else str(options.calibrate),
            )
            write_vectors(saved, names, file, settings, options.batch_size)
            return
    given = {"as": options.as_, "dtype": options.dtype, "calibrate": options.calibrate}
    none_of(given, "is of vectors: give --out=NAME.npy or .parquet")
    predict_files(
        saved,
        names,
        PredictionFile(options.out, options.prefix),
        settings,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )


def none_of(options: Mapping[str, object], reason: str) -> None:
    """Raise InputError if one of the options is given, which are None without."""
    from petl.errors import InputError

    for name, value in options.items():
        if value is not None:
            raise InputError(f"--{name}={value} {reason}")


def evaluate(options: EvalOptions) -> None:
    """Print the scores of a saved adapter on data, and write them with their analysis."""
    from petl.training.runs.early import look_up_columns

    names, settings = split_words([*options.data, *options.overrides])
    if options.retain is None:
        look_up_columns(options.run, names, settings, labels=True)
    # with torch
    from petl.experiments.reports.evaluation_report import print_evaluation, write_evaluation
    from petl.generation.prediction.evaluation import evaluate_saved, folder_of
    from petl.system.processes import is_first

    saved = options.find()
    if options.retain is not None:
        print_retained(options, saved)
        return
    # without --data: RUN/eval-test
    folder = options.out or folder_of(saved, names)
    scores = evaluate_saved(
        saved,
        names,
        settings,
        folder,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    if not is_first():  # of several processes, one writes and prints
        return
    print_evaluation(saved, scores, names)
    if folder is not None:  # an adapter without a run, and no --out
        write_evaluation(saved, folder, scores, names)


def print_retained(options: EvalOptions, saved: "SavedAdapter") -> None:
    """Print what the model of a saved adapter has lost on retained texts, and write it."""
    from petl.errors import InputError
    from petl.experiments.reports.formatting import echo
    from petl.experiments.reports.run_report import write_page
    from petl.generation.prediction.evaluation import folder_of
    from petl.generation.prediction.retained import evaluate_retained
    from petl.system.processes import is_first
    from petl.training.retain.texts import BUNDLED

    others = [*options.data, *options.overrides]
    if others or options.max_new_tokens is not None:
        given = others[0] if others else "--max-new-tokens"
        raise InputError(f"{given} is of another evaluation than --retain: leave one of them out")
    folder = options.out or folder_of(saved, ["retained"])
    found = evaluate_retained(saved, options.retain or [BUNDLED], folder, options.batch_size)
    if not is_first():
        return
    if saved.run is not None:
        write_page(saved.run)
    echo(found)
    if folder is not None:
        echo(f"written to {folder}")


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
