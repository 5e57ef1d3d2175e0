"""The command check: its table, or JSON."""

from collections import defaultdict
from pathlib import Path

from petl.cli.table import CheckAdapterOptions
from petl.errors import InputError, RunStopped
from petl.training.runs.lookup import similar


def check(options: CheckAdapterOptions) -> None:
    """Print what is wrong with an adapter.

    Raises:
        RunStopped: there is an error, or with --strict a warning; with status 1.
    """
    from petl.adapters.check.rules import check
    from petl.experiments.reports.formatting import echo, print_table
    from petl.system.files.disk import as_json

    try:
        found = check(options.path, options.base, options.engine, options.data)
    except InputError as error:
        if Path(options.path).exists():
            raise
        raise InputError(f"{error}{similar(options.path)}") from error
    if options.json:
        echo(as_json(found.as_json(), in_order=True), end="")
    else:
        echo(found)
        reasons: dict[str, list[str]] = defaultdict(list)
        for name, reason in found.not_checked:
            reasons[reason].append(name)
        rows = [(str(finding.severity), finding.what, finding.remedy) for finding in found]
        rows += [
            ("note", f"not checked: {', '.join(names)} ({reason})", "")
            for reason, names in reasons.items()
        ]
        print_table(("severity", "finding", "remedy"), rows)
    errors, warnings = found.count("error"), found.count("warning")
    if errors or (options.strict and warnings):
        raise RunStopped(f"{options.path}: errors: {errors}, warnings: {warnings}")
