"""The one rule of every command that writes (SECURITY.md, "What commands write"), and new folders.

Nothing here imports torch.
"""

import tempfile
from collections.abc import Collection, Generator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from petl.errors import InputError
from petl.system.files.disk import RUN, UNFINISHED, has_files, refuse_inside


def check_output(
    out: Path, own: Collection[str] = (), mark: Collection[str] = (), *, inside: bool = False
) -> None:
    """Check that a command may write the folder `out`: it is new, empty, or the command's own.

    Args:
        own: patterns of the names that the command writes, if it may write its folder again.
        mark: such names, of which the command always leaves at least one.
        inside: the folder is the command's own place in a run, an adapter or a model.

    Raises:
        InputError: the folder holds anything else, or is inside of an adapter, drafter, checkpoint
            or model, or among the checkpoints of a run.
    """
    if not inside:
        refuse_inside(out)
    is_link = out.is_symlink()  # a folder cannot be renamed to one
    if not out.exists() and not is_link:
        return
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() and not is_link else []
    mine = [*own, f"{UNFINISHED}*"] if own else []
    others = [name for name in names if not any(fnmatch(name, pattern) for pattern in mine)]
    if out.is_dir() and not is_link and not others and (not names or {*names} & {*mark}):
        return
    held = f": it holds {(others or names)[0]}" if names else ""
    raise InputError(f"{out} already exists and is not an empty folder{held}; choose another one")


def check_output_file(file: Path) -> None:
    """Check that a command may write `file`, which replaces one of that name outside of runs.

    Raises:
        InputError: it is a file of a run, or inside of an adapter, drafter, checkpoint or model.
    """
    refuse_inside(file)
    run = next((each for each in file.absolute().resolve().parents if has_files(each, RUN)), None)
    if file.exists() and run is not None:
        raise InputError(f"{file} is a file of the run {run}; choose another name")


@contextmanager
def new_folder(out: Path) -> Generator[Path]:
    """Yield a draft folder that becomes `out` at the end of the block, unless it raises.

    Raises:
        InputError: `out` is taken (`check_output`), or cannot be written.
    """
    check_output(out)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        # next to `out`: a rename does not work across file systems
        with tempfile.TemporaryDirectory(prefix=".petl-", dir=out.absolute().parent) as place:
            draft = Path(place) / "draft"
            draft.mkdir()
            yield draft
            if out.is_dir():
                out.rmdir()  # it is empty
            draft.rename(out)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {out}: {error}") from error
