"""The commands push and pull: their arguments and what they print.

Like petl.cli.main, imports nothing heavy until a command runs.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

from petl.cli.arguments import Add, add_run, new_folder_to_write


def add_parsers(add: Add) -> None:
    """Add the parsers of the commands with `add`."""
    push = add("push", "upload an adapter or an exported model to the Hub", PUSH)
    add_run(push, what="folder of a run, an adapter, or of `petl export` or `merge`", loads=False)
    push.add_argument(
        "name", metavar="NAME", help="repository: OWNER/NAME, or NAME in your account"
    )
    push.add_argument("--private", action="store_true", help="create a private repository")
    push.add_argument("--revision", metavar="BRANCH", help="branch to commit to (default: main)")
    push.add_argument("--message", metavar="TEXT", default="", help="message of the commit")
    push.add_argument(
        "--update", action="store_true", help="commit to a repository that exists already"
    )
    push.add_argument(
        "--base",
        metavar="OWNER/NAME[@REVISION]",
        help="name of the base model on the Hub, if it was loaded from a folder of another name",
    )
    push.add_argument(
        "--dry-run", action="store_true", help="list the files with their sizes, and upload nothing"
    )
    pull = add("pull", "download an adapter or a model from the Hub, and check it", PULL)
    pull.add_argument("name", metavar="NAME", help="repository: OWNER/NAME")
    pull.add_argument(
        "folder",
        metavar="FOLDER",
        nargs="?",
        type=new_folder_to_write(),  # checked before the download
        help="folder to write, new or empty (default: the last part of NAME)",
    )
    pull.add_argument("--revision", metavar="REVISION", help="branch, tag or commit")


PUSH = """\
Upload the adapter of a run, an adapter folder, or what `petl export` or `petl merge` wrote, to the
Hugging Face Hub in one commit: weights, config, tokenizer or processor, names of labels and model
card. Files are read strictly before; checkpoints, states of optimizers, code and links never go up.
The base model is named as on the Hub, never by a folder of this machine.
The token is that of HF_TOKEN or of `hf auth login`.

  petl push runs/verbs ada/verbs --dry-run
  petl push runs/verbs ada/verbs --private"""

PULL = """\
Download an adapter or a model of one commit of a repository, and read it strictly: config, names
and shapes of tensors, finite values. The folder appears once all of it was checked.

  petl pull ada/verbs
  petl pull ada/verbs verbs --revision 5e2f0a1"""


def push(arguments: argparse.Namespace) -> None:
    """List the files of a folder, and upload them."""
    from petl.adapters.export import upload
    from petl.experiments.reports.formatting import echo, print_table, size
    from petl.system.files.hub import OnHub

    # names of repositories have no @
    base = OnHub(*arguments.base.split("@", 1)) if arguments.base else None
    prepared = upload.prepare(
        Path(arguments.run),
        arguments.name,
        base=base,
        trust_remote_code=arguments.trust_remote_code,
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
    if arguments.dry_run:
        echo("nothing was uploaded (--dry-run)")
        return
    pushed = upload.push(
        prepared,
        arguments.name,
        private=arguments.private,
        revision=arguments.revision,
        message=arguments.message,
        update=arguments.update,
    )
    echo(f"uploaded to {pushed.url}, commit {pushed.commit}")
    # merged and exported models load without petl
    if prepared.kind == "adapter":
        echo(f'to load it: import petl; model = petl.load(base, "{pushed.name}")')


def pull(arguments: argparse.Namespace) -> None:
    """Download a repository, and print its commit."""
    from petl.adapters.export import download
    from petl.experiments.reports.formatting import echo, size

    # as `git clone` names its folder
    folder = arguments.folder or Path(arguments.name.rpartition("/")[2])
    pulled = download.pull(arguments.name, folder, arguments.revision)
    echo(f"{pulled.kind} in {pulled.folder}, {size(pulled.bytes)}; all files were checked")
    echo(f"commit {pulled.commit} of {arguments.name}")
    if pulled.kind == "adapter":
        echo(f'to load it: import petl; model = petl.load(base, "{pulled.folder}")')


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {"push": push, "pull": pull}
