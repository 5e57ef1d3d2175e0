"""The commands `petl compress`, `petl prune` and `petl combine`: adapters as material.

Imports what `petl.cli.main` may import; the functions import their modules when they run.
"""

import argparse
from functools import partial
from pathlib import Path

from petl.cli.arguments import (
    COUNT,
    Add,
    add_out,
    add_run,
    add_trust,
    each,
    new_folder_to_write,
    number,
)

FRACTION = number(float, 0, 1)
# as in petl.adapters.deltas.combine, which imports torch
METHODS = ("linear", "magnitude_prune", "ties", "dare_linear", "dare_ties")


def add_parsers(add: Add) -> None:
    """Add the parsers of the commands with `add`."""
    compress = add("compress", "write an adapter 14 to 50 times smaller", COMPRESS)
    add_run(compress)
    add_out(compress)
    compress.add_argument(
        "--density",
        type=each(FRACTION),
        default=[0.5],  # a list: argparse parses defaults that are texts only
        metavar="D[,D...]",
        help="fraction of the values kept (default: 0.5)",
    )
    compress.add_argument(
        "--alpha",
        type=_alphas,
        default=["fit"],
        metavar="A[,A...]",
        help="their magnitude in standard deviations, or fit: the best in least squares "
        "(default: fit)",
    )
    prune = add("prune", "drop values of an adapter at random (DARE, DAREx)", PRUNE)
    add_run(prune)
    add_out(prune)
    prune.add_argument(
        "--drop", type=FRACTION, required=True, metavar="P", help="fraction of the values dropped"
    )
    prune.add_argument(
        "--q",
        default="searched",
        type=_divisor,
        metavar="Q",
        help="divisor of the others: searched (the nearest outputs, default), dare (1 - P), auto "
        "(least expected error of each layer), or a number from 1 - P to 1",
    )
    prune.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="RUN is a fully fine-tuned model: prune its difference from this one",
    )
    combine = add("combine", "combine several adapters into one", COMBINE)
    # one RUN alone is refused later, with a message that says why
    combine.add_argument("runs", metavar="RUN", nargs="+", help="folder of a run, or of an adapter")
    combine.add_argument(
        "--out",
        required=True,
        metavar="OUT",
        type=new_folder_to_write(),
        help="folder to write: new or empty",
    )
    combine.add_argument("--method", choices=METHODS, default="linear", help="(default: linear)")
    combine.add_argument("--weights", type=_weights, metavar="W,W", help="one a RUN (default: 1)")
    combine.add_argument(
        "--density",
        type=FRACTION,
        default=1.0,
        metavar="D",
        help="fraction of each adapter's values kept (default: 1)",
    )
    combine.add_argument(
        "--level",
        choices=("tensors", "update"),
        help="update: of the weights, for any methods and ranks, as a LoRA (default, where the "
        "methods have one); tensors: of adapters of one method and size",
    )
    add_trust(combine)
    combine.add_argument("--rank", type=COUNT, metavar="R", help="largest rank of the LoRA")
    # masks are random in every pruning, and in the two dare methods of combining
    for command in (prune, combine):
        command.add_argument(
            "--seed", type=number(int, 0), default=0, metavar="N", help="of the masks (default: 0)"
        )
    for command, scope in ((compress, "tensor"), (combine, "global")):
        command.add_argument(
            "--scope",
            choices=("global", "tensor"),
            default=scope,
            help=f"the largest values of all tensors together, or of each (default: {scope})",
        )
    for command in (compress, prune, combine):
        command.add_argument(
            "--exclude",
            nargs="+",
            default=[],
            metavar="PATTERN",
            help="leave tensors unchanged in whose name a regular expression is found",
        )


def _alphas(text: str) -> list[float | str]:
    """Parse numbers above 0, and fit, with commas in between."""
    return [
        part if part == "fit" else number(float, 0, above=True)(part) for part in text.split(",")
    ]


def _weights(text: str) -> list[float]:
    # a negative weight subtracts an adapter
    return [number(float, -1e6, 1e6)(part) for part in text.split(",")]


def _divisor(text: str) -> float | str:
    return text if text in ("auto", "dare", "searched") else FRACTION(text)


COMPRESS = """\
Write an adapter of which only the signs of the largest values are kept, with one magnitude
(ComPEFT). `petl.load` and all commands read the folder; petl.deltas.expand makes a plain one of it.

  petl compress runs/mine small
  petl compress runs/mine small --density 0.1,0.2,0.5 --alpha fit,1,2,4

Of several densities or alphas, the one that scores best on the run's validation rows is written."""

PRUNE = """\
Write an adapter of which a random fraction of the values is 0 and the others are divided by q. Of
LoRA, only B is pruned: A does not start at 0.

  petl prune runs/mine thin --drop 0.9
  petl prune FINE_TUNED thin --drop 0.9 --q dare --base BASE"""

COMBINE = """\
Write one adapter from several: their sum (linear), or the sum of what is left of each after pruning
by magnitude, by election of signs (ties), or at random (dare_linear, dare_ties).

  petl combine runs/verbs runs/nouns --out both --method ties --density 0.3
  petl combine runs/lora runs/mos --out both --level update"""


def compress(arguments: argparse.Namespace) -> None:
    """Write a compressed adapter, and print what was kept and how the outputs compare."""
    from petl.adapters.deltas.adapters import read, write_compressed
    from petl.adapters.deltas.measured import change_by, compress_best
    from petl.adapters.export.saved_adapter import find
    from petl.core.adapter_folder import weights_file
    from petl.core.compressed import compressed_file
    from petl.experiments.reports.differences import print_change
    from petl.experiments.reports.formatting import echo, size
    from petl.ops.ternary import FILE

    saved = find(
        arguments.run,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
    )
    out = arguments.out
    found, trials, metric = compress_best(
        saved,
        arguments.density,
        arguments.alpha,
        scope=arguments.scope,
        exclude=arguments.exclude,
    )
    # no trials with one density and one alpha: nothing is scored then
    for trial in trials:
        echo(
            f"density {trial.density:g}, alpha {trial.alpha}: validation {metric} "
            f"{trial.scores[metric]:.4f}"
        )
    kept = sum(found.kept.values())
    echo(f"kept {kept:,} of {found.numel:,} values, {found.bits:.3f} bits each", end=" ")
    echo(f"(density {found.settings['density']:g}, alpha {found.settings['alpha']})")
    # with --scope global, the largest values may leave none to a tensor of small ones
    emptied = [name for name, count in found.kept.items() if not count]
    if emptied:
        echo(f"{len(emptied)} of {len(found.kept)} tensors have no value left", end=" ")
        echo(f"(such as {emptied[0]}); --scope tensor keeps some of each")
    write = partial(write_compressed, read(saved.adapter), found)
    print_change(
        change_by(saved, write),
        "a larger --density, --alpha fit or --scope tensor may lose less, and of several densities "
        "or alphas the best is chosen on validation rows",
    )
    write(out)
    # of the weights alone: the other files are the same
    weights = compressed_file(saved.adapter) or weights_file(saved.adapter)
    before, after = weights.stat().st_size, (out / FILE).stat().st_size
    echo(f"{size(before)} -> {size(after)} ({before / after:.1f} times smaller) in {out}")


def prune(arguments: argparse.Namespace) -> None:
    """Write a pruned adapter or model, and print what was kept."""
    from petl.adapters.deltas.adapters import count_kept, pruned, pruned_names, read, write_pruned
    from petl.adapters.deltas.full_model import prune_model
    from petl.adapters.deltas.measured import change_by, closed_divisors, searched_divisor
    from petl.adapters.deltas.prune import divisor_of
    from petl.adapters.export.saved_adapter import find
    from petl.errors import InputError
    from petl.experiments.reports.differences import print_change
    from petl.experiments.reports.formatting import echo

    out, drop, q = arguments.out, arguments.drop, arguments.q
    # two complete models, without a run and its data
    if arguments.base is not None:
        if q in ("auto", "searched"):
            raise InputError(f"--q {q} needs the data of a run; with --base give dare or a number")
        chosen = None if q == "dare" else q  # None: 1 - drop
        counts = prune_model(
            Path(arguments.run),
            arguments.base,
            out,
            drop,
            q=chosen,
            seed=arguments.seed,
            exclude=arguments.exclude,
        )
        echo(f"kept {counts[0]:,} of {counts[1]:,} changed values, in {out}")
        echo(f"divided by {divisor_of(chosen, '', drop):.3g}")
        return
    saved = find(
        arguments.run,
        trust_remote_code=arguments.trust_remote_code,
        other_base=arguments.other_base,
    )
    material = read(saved.adapter)
    # None until one is measured: 1 - drop
    divisors = None if q in ("dare", "auto", "searched") else q
    if q == "auto":
        divisors = closed_divisors(saved, material, drop, arguments.exclude)
    elif q == "searched":
        found = searched_divisor(
            saved, material, drop, seed=arguments.seed, exclude=arguments.exclude
        )
        divisors = found.q
    state = pruned(material, drop, q=divisors, seed=arguments.seed, exclude=arguments.exclude)
    names = pruned_names(material, arguments.exclude)
    values = sum(state[name].numel() for name in names)
    kept = count_kept(material, state, names)
    used = [divisor_of(divisors, name, drop) for name in names]
    low, high = min(used), max(used)
    echo(f"kept {kept:,} of {values:,} values of {len(names)} tensors", end=", ")
    echo(f"divided by {low:.3g}" + (f" to {high:.3g}" if high > low else ""))
    write = partial(write_pruned, material, state, drop=drop, q=divisors, seed=arguments.seed)
    print_change(change_by(saved, write), "a smaller --drop or --q searched may lose less")
    write(out)
    echo(f"written to {out}")


def combine(arguments: argparse.Namespace) -> None:
    """Write a combined adapter."""
    from petl.adapters.deltas.updates import combine_adapters, level_for
    from petl.adapters.export.saved_adapter import find
    from petl.experiments.reports.formatting import echo

    trusted = {"trust_remote_code": arguments.trust_remote_code}
    trusted["other_base"] = arguments.other_base
    found = [find(run, **trusted).adapter for run in arguments.runs]  # checked, whatever the level
    level = arguments.level or level_for(found)
    lost = combine_adapters(
        # of runs, which the level update may have to load
        arguments.runs,
        arguments.out,
        arguments.method,
        level=level,
        rank=arguments.rank,
        weights=arguments.weights,
        density=arguments.density,
        seed=arguments.seed,
        scope=arguments.scope,
        exclude=arguments.exclude,
        **trusted,
    )
    echo(f"{arguments.method} of {len(arguments.runs)} adapters in {arguments.out}, level {level}")
    if level == "update":
        echo(f"a LoRA; its rank loses {100 * lost:.2g} % of the norm of the update")
    elif arguments.method == "linear":
        # B1 A1 + B2 A2 is not (B1 + B2) (A1 + A2)
        echo(
            "tensors were added: for LoRA, A and B separately, so that the update has cross terms;"
        )
        echo("--level update adds the updates themselves")


COMMANDS = {"compress": compress, "prune": prune, "combine": combine}
