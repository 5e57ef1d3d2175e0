"""Download an adapter or a complete model from the Hugging Face Hub, and check it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download

from petl.adapters.export.checked_folder import folder_bytes
from petl.adapters.export.shipped import MODEL, MODULES, check, chosen, module_folders
from petl.core.adapter_folder import CONFIG
from petl.errors import InputError
from petl.system.files import hub
from petl.system.files.disk import check_links
from petl.system.files.outputs import check_output, new_folder


@dataclass(frozen=True)
class Download:
    """A downloaded folder.

    Attributes:
        folder: that was written.
        kind: "adapter" or "model".
        commit: of the repository, in full.
        bytes: size of the folder.
    """

    folder: Path
    kind: str
    commit: str
    bytes: int


def pull(name: str, folder: Path, revision: str | None = None) -> Download:
    """Download the files of one commit; the folder appears once all of them were checked.

    Args:
        name: OWNER/NAME.
        revision: a branch, tag or commit; None: main.

    Raises:
        InputError: the folder is taken; there is no such repository or revision, or it is gated; it
            holds no adapter or model; a file of it is damaged or could contain code.
        RunStopped: the Hub does not answer.
    """
    check_output(folder)
    with hub.connected(name, revision):
        info = HfApi().model_info(name, revision=revision, timeout=hub.TIMEOUT)
    present = [file.rfilename for file in info.siblings or ()]
    if not {CONFIG, MODEL} & {*present}:
        raise InputError(f"{name} has neither {CONFIG} nor {MODEL}: it holds no adapter or model")
    with new_folder(folder) as draft:
        with hub.connected(name, revision):
            modules = {}
            if MODULES in chosen(present):  # which says where further files are
                hf_hub_download(name, MODULES, revision=info.sha, local_dir=draft)
                modules = module_folders(draft)
            for file in chosen(present, modules):  # of this commit, whatever happens to the branch
                hf_hub_download(name, file, revision=info.sha, local_dir=draft)
        shutil.rmtree(draft / ".cache", ignore_errors=True)  # huggingface_hub's notes
        check_links(draft)
        kind = check(draft)
    return Download(folder, kind, str(info.sha), folder_bytes(folder))
