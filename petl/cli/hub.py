"""The commands push and pull: what they print."""

from pathlib import Path

from petl.adapters.export import download, upload
from petl.cli.table import PullOptions, PushOptions
from petl.experiments.reports.formatting import echo, print_table, size
from petl.system.files.paths import OnHub


def push(options: PushOptions) -> None:
    """List the files of a folder, and upload them."""
    # names of repositories have no @
    base = OnHub(*options.base.split("@", 1)) if options.base else None
    prepared = upload.prepare(
        Path(options.run),
        options.name,
        base=base,
        trust_remote_code=options.trust_remote_code,
    )
    sizes = prepared.sizes
    rows = [*((name, size(count)) for name, count in sizes.items())]
    print_table(("file", ">size"), [*rows, ("total", size(sum(sizes.values())))])
    # checkpoints, optimizer states, code and links, see PUSH
    if prepared.left_out:
        echo(f"stay here: {', '.join(prepared.left_out)}")
    if prepared.base is not None:
        # name and revision, of which the second may be absent
        echo(f"base model: {'@'.join(filter(None, prepared.base))}")
    # after all checks of a real upload
    if options.dry_run:
        echo("nothing was uploaded (--dry-run)")
        return
    pushed = upload.push(
        prepared,
        options.name,
        private=options.private,
        revision=options.revision,
        message=options.message,
        update=options.update,
    )
    echo(f"uploaded to {pushed.url}, commit {pushed.commit}")
    # merged and exported models load without petl
    if prepared.kind == "adapter":
        echo(f'to load it: import petl; model = petl.load(base, "{pushed.name}")')


def pull(options: PullOptions) -> None:
    """Download a repository, and print its commit."""
    # as `git clone` names its folder
    folder = options.folder or Path(options.name.rpartition("/")[2])
    pulled = download.pull(options.name, folder, options.revision)
    echo(f"{pulled.kind} in {pulled.folder}, {size(pulled.bytes)}; all files were checked")
    echo(f"commit {pulled.commit} of {options.name}")
    if pulled.kind == "adapter":
        echo(f'to load it: import petl; model = petl.load(base, "{pulled.folder}")')
