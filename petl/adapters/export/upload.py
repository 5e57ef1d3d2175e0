"""Upload an adapter or a complete model to the Hugging Face Hub, in one commit."""

import logging
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError

from petl.adapters.check.contents import dead_layers
from petl.adapters.export.card import described
from petl.adapters.export.saved_adapter import SavedAdapter, find
from petl.adapters.export.shipped import MODULES, check, chosen, module_folders
from petl.core.adapter_folder import CONFIG
from petl.data.models.sources import read_source
from petl.errors import InputError, RunStopped, first_line
from petl.system.files import hub
from petl.system.files.disk import as_json
from petl.system.files.paths import OnHub, is_repository
from petl.system.files.read import read_json, read_text
from petl.training.runs.card_code import placed
from petl.training.runs.model_card import README, known_base, model_card

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Upload:
    """What would go up.

    Attributes:
        folder: whose files they are.
        kind: "adapter" or "model".
        files: by name, the path of a file, or its content where that differs.
        left_out: names of the other files.
        base: where the Hub has the base model of an adapter; None: unknown.
    """

    folder: Path
    kind: str
    files: Mapping[str, Path | bytes]
    left_out: list[str]
    base: OnHub | None

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each file, in bytes."""
        return {
            name: len(file) if isinstance(file, bytes) else file.stat().st_size
            for name, file in self.files.items()
        }


@dataclass(frozen=True)
class UploadResult:
    """A repository after an upload: its name, address and the commit."""

    name: str
    url: str
    commit: str


# What goes up


def prepare(
    path: Path, name: str, *, base: OnHub | None = None, trust_remote_code: bool = False
) -> Upload:
    """Choose and check the files of a run, adapter or exported folder; the Hub is not asked.

    The base model in adapter_config.json, and the adapter in the code of its card, get their names
    on the Hub in place of folders of this machine. Layers that never trained are warned of.

    Args:
        name: of the repository, for the card.
        base: the base model's name on the Hub; None: as the run or adapter has it.
        trust_remote_code: as of `find`.

    Raises:
        InputError: it is no adapter or model; a file is damaged; one of them is a link.
    """
    if not is_repository(name):
        raise InputError(f"{name!r} is no name of a repository: write OWNER/NAME, or NAME")
    is_model = (path / "config.json").is_file() and not (path / CONFIG).is_file()
    saved = None if is_model else find(path, trust_remote_code=trust_remote_code)
    folder = path if saved is None else saved.adapter
    files = {str(p.relative_to(folder).as_posix()): p for p in folder.rglob("*") if not p.is_dir()}
    names = chosen(files)
    if MODULES in names:
        names = chosen(files, module_folders(folder))
    for each in names:
        if not stat.S_ISREG(files[each].lstat().st_mode):
            raise InputError(f"{files[each]} is a link: put a copy of the file in its place")
    kind = check(folder)
    for found in dead_layers(folder) if kind == "adapter" else ():
        logger.warning("%s: %s; %s", found.id, found.what, found.remedy)
    changed = {} if saved is None else adapted(saved, name, base)
    if saved is None and README in names:
        changed = {README: placed(read_text(folder / README), name).encode()}
    content: dict[str, Path | bytes] = {each: files[each] for each in names}
    origin = None if saved is None else base or base_of(saved)
    return Upload(folder, kind, content | changed, sorted({*files} - {*names}), origin)


def base_of(saved: SavedAdapter) -> OnHub | None:
    """Return where the Hub has the base model of an adapter, at the commit that it was."""
    return known_base(read_source(saved.settings["model"]), saved.config.revision)


def adapted(saved: SavedAdapter, name: str, base: OnHub | None) -> dict[str, Path | bytes]:
    """Return config and card of an adapter as they go up: no folder of this machine is named."""
    config = read_json(saved.adapter / CONFIG, dict[str, Any])
    place, origin = str(config.get("base_model_name_or_path")), base or base_of(saved)
    if origin is None:
        logger.warning(
            "the base model is a folder that is not on the Hub, so the uploaded adapter does not "
            "name it; give --base OWNER/NAME if the Hub has it under another name"
        )
    config["base_model_name_or_path"] = origin.name if origin else None
    config["revision"] = origin.revision if origin else None
    file = saved.adapter / README
    text = read_text(file) if file.exists() else ""
    own = {str(saved.adapter.absolute()), *([place] if Path(place).is_absolute() else [])}
    if not text or base or any(folder in text for folder in own):
        if text:
            logger.warning("%s is replaced by a new card, which names no folder", README)
        text = model_card(described(saved, saved.config, base=origin))
    return {CONFIG: as_json(config).encode(), README: placed(text, name).encode()}


# The Hub


def push(
    upload: Upload,
    name: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "",
    update: bool = False,
) -> UploadResult:
    """Upload files to a repository, which is created unless `update`.

    Args:
        name: OWNER/NAME, or NAME in the account of the token.
        private: only its owner sees the repository.
        revision: a branch, created if there is none; None: main.
        message: of the commit.
        update: add a commit to an existing repository.

    Raises:
        InputError: there is no token, or it is not valid; the repository exists, or does not allow
            this; it would not be private.
        RunStopped: the Hub does not answer.
    """
    with hub.connected(name, revision):
        api = HfApi(token=token())
        full = name if "/" in name else f"{api.whoami()['name']}/{name}"
        make_repository(api, full, private=private, update=update)
        if revision is not None:
            api.create_branch(full, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(path, file if isinstance(file, bytes) else str(file))
            for path, file in upload.files.items()
        ]
        message = message or f"Upload {upload.kind}, trained with petl"
        try:
            made = api.create_commit(full, operations, commit_message=message, revision=revision)
        except RuntimeError as error:  # of a large file
            cause = first_line(error.__cause__ if isinstance(error.__cause__, OSError) else error)
            raise RunStopped(f"the upload failed, and nothing was committed: {cause}") from error
        except ValueError as error:  # the Hub does not accept the metadata of the card
            raise InputError(" ".join(str(error).split())) from error
    return UploadResult(full, f"{api.endpoint}/{full}", made.oid)


def token() -> str:
    """Return the token of the environment or of the login.

    Raises:
        InputError: there is none.
    """
    found = get_token()
    if not found:
        raise InputError(
            "there is no token of the Hub: set HF_TOKEN to one with write access, or run: "
            "hf auth login"
        )
    return found


def make_repository(api: HfApi, name: str, *, private: bool, update: bool) -> None:
    """Create a repository, or check that the present one takes an update.

    Raises:
        InputError: it has files and `update` is False; it is public and should be private.
    """
    try:
        info = api.model_info(name, timeout=hub.TIMEOUT)
    except RepositoryNotFoundError:
        api.create_repo(name, private=private)
        return
    if {file.rfilename for file in info.siblings or ()} - {".gitattributes"} and not update:
        raise InputError(
            f"{name} exists already: add --update to commit to it, or choose another name"
        )
    if private and not info.private:
        raise InputError(f"{name} exists and is public: make it private on its page, then --update")
