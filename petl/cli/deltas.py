"""The commands `petl compress`, `petl prune` and `petl combine`: adapters as material."""

import shlex
from functools import partial
from pathlib import Path

from petl.adapters.deltas.adapters import (
    count_kept,
    pruned,
    pruned_names,
    read,
    write_compressed,
    write_pruned,
)
from petl.adapters.deltas.full_model import prune_model
from petl.adapters.deltas.measured import (
    change_by,
    closed_divisors,
    compress_best,
    searched_divisor,
)
from petl.adapters.deltas.narrow import narrow_folder
from petl.adapters.deltas.prune import divisor_of
from petl.adapters.deltas.updates import combine_adapters, level_for
from petl.adapters.export.saved_adapter import find
from petl.cli.table import CombineOptions, CompressOptions, NarrowOptions, PruneOptions
from petl.core.adapter_file import WEIGHTS
from petl.core.adapter_widths import record
from petl.errors import InputError
from petl.experiments.reports.differences import print_change
from petl.experiments.reports.formatting import echo, size
from petl.ops.ternary import FILE


def compress(options: CompressOptions) -> None:
    """Write a compressed adapter, and print what was kept and how the outputs compare."""
    saved = options.find()
    out = options.out
    found, trials, metric = compress_best(
        saved,
        options.density,
        options.alpha,
        scope=options.scope,
        exclude=options.exclude,
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
    before, after = saved.folder.weights.stat().st_size, (out / FILE).stat().st_size
    echo(f"{size(before)} -> {size(after)} ({before / after:.1f} times smaller) in {out}")


def prune(options: PruneOptions) -> None:
    """Write a pruned adapter or model, and print what was kept."""
    out, drop, q = options.out, options.drop, options.q
    # two complete models, without a run and its data
    if options.base is not None:
        if q in ("auto", "searched"):
            raise InputError(f"--q {q} needs the data of a run; with --base give dare or a number")
        chosen = None if q == "dare" else q  # None: 1 - drop
        counts = prune_model(
            Path(options.run),
            options.base,
            out,
            drop,
            q=chosen,
            seed=options.seed,
            exclude=options.exclude,
        )
        echo(f"kept {counts[0]:,} of {counts[1]:,} changed values, in {out}")
        echo(f"divided by {divisor_of(chosen, '', drop):.3g}")
        return
    saved = options.find()
    material = read(saved.adapter)
    # None until one is measured: 1 - drop
    divisors = None if q in ("dare", "auto", "searched") else q
    if q == "auto":
        divisors = closed_divisors(saved, material, drop, options.exclude)
    elif q == "searched":
        found = searched_divisor(saved, material, drop, seed=options.seed, exclude=options.exclude)
        divisors = found.q
    state = pruned(material, drop, q=divisors, seed=options.seed, exclude=options.exclude)
    names = pruned_names(material, options.exclude)
    values = sum(state[name].numel() for name in names)
    kept = count_kept(material, state, names)
    used = [divisor_of(divisors, name, drop) for name in names]
    low, high = min(used), max(used)
    echo(f"kept {kept:,} of {values:,} values of {len(names)} tensors", end=", ")
    echo(f"divided by {low:.3g}" + (f" to {high:.3g}" if high > low else ""))
    write = partial(write_pruned, material, state, drop=drop, q=divisors, seed=options.seed)
    print_change(change_by(saved, write), "a smaller --drop or --q searched may lose less")
    write(out)
    echo(f"written to {out}")


def combine(options: CombineOptions) -> None:
    """Write a combined adapter."""
    trusted = {"trust_remote_code": options.trust_remote_code}
    trusted["other_base"] = options.other_base
    found = [find(run, **trusted).adapter for run in options.runs]  # checked, whatever the level
    level = options.level or level_for(found)
    lost = combine_adapters(
        # of runs, which the level update may have to load
        options.runs,
        options.out,
        options.method,
        level=level,
        rank=options.rank,
        weights=options.weights,
        density=options.density,
        seed=options.seed,
        scope=options.scope,
        exclude=options.exclude,
        **trusted,
    )
    echo(f"{options.method} of {len(options.runs)} adapters in {options.out}, level {level}")
    if level == "update":
        echo(f"a LoRA; its rank loses {100 * lost:.2g} % of the norm of the update")
    elif options.method == "linear":
        # B1 A1 + B2 A2 is not (B1 + B2) (A1 + A2)
        echo(
            "tensors were added: for LoRA, A and B separately, so that the update has cross terms;"
        )
        echo("--level update adds the updates themselves")


def narrow(options: NarrowOptions) -> None:
    """Write the narrowed adapter, and say whether its width was trained."""
    saved, k = options.find(), options.width
    folder = saved.run or saved.adapter.absolute()  # "." has no name
    out = options.out or folder.with_name(f"{folder.name}-width-{k}")
    nested = record.read(saved.folder.file(record.FILE))
    narrow_folder(saved.adapter, k, out)
    if nested is None or k not in nested.widths:
        known = "" if nested is None else f" (only {', '.join(map(str, nested.widths))})"
        echo(f"width {k} was not trained to work alone{known}: score it before you use it, by")
        echo(f"  {shlex.join(['petl', 'eval', str(out), '--data', 'FILE'])}")
    echo(f"written with width {k} to {out}, {size((out / WEIGHTS).stat().st_size)}")
