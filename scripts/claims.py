"""What the papers claim, tried on real data: one command a claim.

    python scripts/claims.py mola                    # one claim; resumes where it was stopped
    python scripts/claims.py mola increlora --jobs 2 # several, in this order
    python scripts/claims.py mola --quick            # spot check: a seed, published rates
    python scripts/claims.py retain                  # curves of what is lost
    python scripts/claims.py shrink                  # widths and ranks by importance
    python scripts/claims.py --list                  # the claims
    python scripts/claims.py --publish runs/claims   # results of a folder into the pages
    python scripts/claims.py shrink --publish        # those of one claim, of runs/claims

Trains the contenders of a claim: the learning rate of each is chosen on validation rows, from the
same rates outward, then each is trained with five seeds and scored on the test rows.
FOLDER/NAME.json has what was measured; docs/claims.md shows it after `--publish` and
`scripts/build_docs.py refresh`.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see train.py

from claims import retain, shrink
from claims.catalog import CLAIMS
from claims.claim import Claim
from claims.page import listing, spot_table, summary
from claims.pictures import publish
from claims.results import PUBLISHED, read_published
from claims.running import refuse_at_a_time, spot_check, try_claim

from petl.cli.arguments import folder_to_write
from petl.cli.table import JOBS
from petl.errors import InputError, did_you_mean
from petl.experiments.reports.formatting import echo
from petl.training import program as app

OWN = {retain.NAME: retain, shrink.NAME: shrink}  # claims with a module of their own
FOLDER = Path("runs/claims")
ASSETS = Path(__file__).resolve().parents[1] / "docs/assets/claims"


def main() -> int:
    """Run the command; return its exit status."""
    arguments = parser().parse_args()
    app.log_to_stderr()
    return app.reported(lambda: run_all(arguments))


def run_all(arguments: argparse.Namespace) -> None:
    """Publish results; or try the claims that have no statements, and then the others."""
    if arguments.publish:
        publish_all(arguments.publish, arguments.names)
        return
    own = [name for name in arguments.names if name in OWN]
    for name in own:
        OWN[name].run(arguments.folder.absolute(), jobs=arguments.jobs, quick=arguments.quick)
    arguments.names = [name for name in arguments.names if name not in OWN]
    if arguments.names or not own:
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Try the claims, or list them."""
    for name in arguments.names:
        if name not in CLAIMS:
            raise InputError(
                f"no claim {name!r}{did_you_mean(name, CLAIMS)}: use some of {', '.join(CLAIMS)}"
            )
    claims = [CLAIMS[name] for name in arguments.names]
    if arguments.list:
        listing().print()
    elif not arguments.names:
        raise InputError(f"no claim is given: use some of {', '.join(CLAIMS)}, or --list")
    elif arguments.quick:
        published = read_published()
        for claim in claims:
            folder = arguments.folder.absolute() / "quick"
            known = published.get(claim.name)
            spot_table(claim, known, spot_check(claim, known, folder)).print(claim.title)
    else:
        try_all(claims, arguments)


def publish_all(folder: Path, names: list[str]) -> None:
    """Copy the results of these claims, or of all, from a folder into the pages' own."""
    asked = names or [*OWN, *CLAIMS]
    done = [
        name for name, module in OWN.items() if name in asked and module.publish(folder, ASSETS)
    ]
    done += publish(folder, PUBLISHED, ASSETS, asked)
    missing = sorted({*names} - {*done})
    if missing or not done:
        words = ", ".join(missing or asked)
        raise InputError(f"{folder} has no results of claims ({words}): try one first")
    for name in done:
        echo(f"published: {name}")
    echo("to update the pages: python scripts/build_docs.py refresh")


def try_all(claims: list[Claim], arguments: argparse.Namespace) -> None:
    """Try the claims, and print their verdicts."""
    for claim in claims:  # before the first of them is trained
        refuse_at_a_time(claim, together=arguments.together)
    for claim in claims:
        jobs = 1 if claim.alone else arguments.jobs
        options = f" --jobs {jobs}" if jobs > 1 else ""
        command = shlex.join(["python", "scripts/claims.py", claim.name]) + options
        result = try_claim(claim, arguments.folder.absolute(), command, jobs, arguments.together)
        summary(claim, result).print(claim.title)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    command_line = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = command_line.add_argument
    add("names", metavar="NAME", nargs="*", help=", ".join([*CLAIMS, *OWN]))
    add(
        "--folder",
        type=folder_to_write,
        default=FOLDER,
        metavar="FOLDER",
        help="of the runs, new or to be resumed (%(default)s)",
    )
    add(
        "--jobs",
        type=JOBS,
        default=1,
        metavar="N",
        help="number of runs at a time (1; always 1 if a claim is about time or memory)",
    )
    add(
        "--together",
        type=JOBS,
        default=1,
        metavar="N",
        help="runs of a contender that train in one pass over one base (1: each alone)",
    )
    add(
        "--quick",
        action="store_true",
        help="spot check: one seed of the first statement's contenders at the published rates",
    )
    add("--list", action="store_true", help="list the claims, and what is left to try")
    add(
        "--publish",
        type=Path,
        nargs="?",
        const=FOLDER,
        metavar="FOLDER",
        help=f"copy results of a folder ({FOLDER}), draw pictures; with names, of these claims",
    )
    return command_line


if __name__ == "__main__":
    sys.exit(main())
