"""The command that started a run or a sweep, the one that resumes it, and the folders of configs.

The folders are petl's own, `./configs` of the working directory, and --config-dir.
A sweep is `petl train -m ...`: several runs, one after the other. Nothing here imports torch.
"""

import logging
import os
import re
import shlex
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hydra.core.config_search_path import ConfigSearchPath, SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from petl.errors import InputError, did_you_mean
from petl.system.files.paths import config_dir

logger = logging.getLogger(__name__)
# settings that may be templates, with a brace that Hydra would take for the begin of a dictionary
TEMPLATE = re.compile(
    r"\+*data\.(?:text|text_pair|target|prompt|answer|system)=(?!['\"\[]).*\{.*",
    re.DOTALL,
)
# texts put before others, whose last space Hydra would cut off, and patterns with brackets
PREFIX = re.compile(
    r"\+*data\.(?:query|document)_prefix=(?!['\"]).*\s|\+*task\.pattern=(?!['\"]).*[^\w.-].*",
    re.DOTALL,
)
OPTUNA = "hydra_plugins.hydra_optuna_sweeper"  # prefix of the sweeper's module


_words: ContextVar[Sequence[str] | None] = ContextVar("_words", default=None)


@contextmanager
def as_run(words: Sequence[str]) -> Generator[None]:
    """Inside the block, work for one of several runs of this process, which has these words."""
    token = _words.set(words)
    try:
        yield
    finally:
        _words.reset(token)


def run_of_several() -> Sequence[str] | None:
    """Return the words of the run, as `as_run` has got them; None: a process has one run."""
    return _words.get()


def command(**settings: object) -> str:
    """Return the shell command of this run, with `train.<name>=<value>` for each of `settings`."""
    words = run_of_several()
    is_override = words is not None or HydraConfig.initialized()
    if words is None:
        words = HydraConfig.get().overrides.task if is_override else sys.argv[1:]
    # earlier values of the same settings are replaced
    keys = tuple(f"train.{name}=" for name in settings)
    kept = [word for word in words if not word.lstrip("+").startswith(keys)]
    folder = config_dir_option(sys.argv[1:])
    if is_override and folder is not None:  # an option, and no override
        kept = ["--config-dir", folder, *kept]
    chosen = [word_of(f"train.{name}", value) for name, value in settings.items()]
    return in_shell([*kept, *chosen])


def word_of(key: str, value: object) -> str:
    """Return KEY=VALUE as Hydra reads it, in quotes if it would read the plain text otherwise."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    word = f"{key}={value}"
    try:
        is_plain = OverridesParser.create().parse_override(word).value() == str(value)
        is_plain &= "${" not in word
    except HydraException:  # letters such as é, brackets, equals signs
        is_plain = False
    return word if is_plain else f"{key}={quoted(str(value))}"


def quoted(text: str) -> str:
    """Return a text in quotes for a command line of Hydra, which reads it as it is."""
    # of backslashes, Hydra reads those before a quote as escapes
    text = re.sub(r"(\\*)'", lambda found: found[1] * 2 + r"\'", text)
    text = re.sub(r"\\+$", lambda found: found[0] * 2, text)
    return "'" + text.replace("${", r"\${") + "'"


def with_quoted_texts(words: Sequence[str]) -> list[str]:
    """The words of a command line, with quotes around templates such as data.prompt={question}.

    And around prefixes that end in a space.
    """

    def quoted(word: str) -> str:
        found = TEMPLATE.fullmatch(word) or PREFIX.fullmatch(word)
        if found is None or "${" in word:  # an interpolation, which Hydra reads as it is
            return word
        key, _, value = word.partition("=")
        escaped = value.replace('"', '\\"')
        return f'{key}="{escaped}"'

    return [quoted(word) for word in words]


def config_dir_option(words: Sequence[str]) -> str | None:
    """The value of `--config-dir` in the words after `petl train`; None without it."""
    found = None
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, _, value = word.partition("=")
        if option in ("--config-dir", "-cd"):
            found = value or following
    return found


def read_words(words: Sequence[str]) -> bool:
    """Search the folder of `--config-dir`; return True if the words of `petl train` ask for help.

    Hydra's own help lists less.
    """
    folder = config_dir_option(words)
    if folder is not None and Path(folder).is_dir():  # Hydra reports one that is not
        add_config_dir(folder)
    return bool({"-h", "--help"} & {*words})


def in_shell(words: list[str]) -> str:
    """Return the shell command that starts `petl train`, as it was started here, with `words`.

    In a checkout that is `python train.py`; under torchrun or `python -m`, `-m petl train`. In any
    other program, such as a worker of a cluster, it is `petl train`, which does the same.
    """
    script, launched = sys.argv[0], launcher()
    if Path(script).name == "train.py":
        return shlex.join([*launched, script, *words])
    if launched == ["python"] and Path(script).parts[-2:] != ("petl", "__main__.py"):
        return shlex.join(["petl", "train", *words])
    return shlex.join([*launched, "-m", "petl", "train", *words])


def launcher() -> list[str]:
    """Return the command before the script or module: python, or torchrun as in this process."""
    workers, machines = (
        os.environ.get(name, "1") for name in ("LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE")
    )
    if machines != "1":  # the user runs the same command on each machine
        endpoint = f"{os.environ['MASTER_ADDR']}:29500"
        rendezvous = ["--nnodes", machines, "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
        return ["torchrun", *rendezvous, "--nproc_per_node", workers]
    return ["torchrun", "--nproc_per_node", workers] if workers != "1" else ["python"]


def in_sweep() -> bool:
    """Return True if this run is one of several that one command makes."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def is_optuna() -> bool:
    """Return True if Optuna chooses the settings of this sweep's runs."""
    return HydraConfig.get().sweeper._target_.startswith(OPTUNA)


def how_to_resume(checkpoint: object = None) -> str:
    """Return the end of a message: how to resume this run, or the sweep that it belongs to.

    Args:
        checkpoint: the run's last one; None if the run may have left none.
    """
    if in_sweep():
        return how_to_resume_sweep()
    if checkpoint is None:
        return "train.resume=auto resumes from the last checkpoint, if there is one"
    return f"to resume: {command(resume=checkpoint)}"


def how_to_resume_sweep() -> str:
    """Return the command that resumes this sweep, and what it does with the present runs."""
    words = [word for word in sys.argv[1:] if not word.startswith("hydra.sweep.dir=")]
    searching = any(word.lstrip("+").startswith("search=") for word in words)
    if not searching and "train.resume=auto" not in words:
        words.append("train.resume=auto")  # the files of configs/search set it themselves
    if is_optuna():
        trials = HydraConfig.get().sweeper.n_trials
        note = f"it adds {trials} trials, or hydra.sweeper.n_trials=N, to the earlier ones"
    else:
        note = "finished runs are skipped"
    return f"to resume the sweep: {in_shell(words)}\n({note})"


def how_to_continue() -> str:
    """Return the end of a message: the command that goes on with this study."""
    return f"to continue, with finished runs kept: {shlex.join(['petl', *sys.argv[1:]])}"


# Folders of configurations

CONFIG = "train"  # the file in `config_dir`, without its suffix
IN_WORKING_DIR = "configs"  # the folder of the user's own configurations
DEFAULT_GROUPS = ("model", "data", "tracker")  # in the defaults list of train.yaml
# what W&B reads, settings of Hydra itself, and what petl draft trains
NOT_GROUPS = {"sweep", "hydra", "drafter"}


_added: list[Path] = []  # the folders of `--config-dir`


def add_config_dir(folder: str | Path) -> None:
    """Look in `folder` first for files such as method/mine.yaml, as `--config-dir` does.

    Raises:
        InputError: it is not a directory.
    """
    if not Path(folder).is_dir():
        raise InputError(f"--config-dir {folder} is not a directory")
    path = Path(folder).absolute()
    if path not in _added:
        _added.append(path)


def config_dir_words() -> list[str]:
    """The option `--config-dir` of this command, for another one; [] without it."""
    return [word for folder in _added for word in ("--config-dir", str(folder))]


def working_dir_configs() -> Path | None:
    """`./configs` of the working directory, unless it is petl's own or that of `--config-dir`."""
    folder = Path.cwd() / IN_WORKING_DIR
    if not folder.is_dir() or any(folder.samefile(other) for other in (*_added, config_dir())):
        return None
    return folder


def is_complete(folder: Path) -> bool:
    """True if a folder has a train.yaml: another program's configurations, or a copy of petl's.

    As `./configs` it is searched after petl's own: another program's train.yaml is no run of petl.
    """
    return (folder / f"{CONFIG}.yaml").is_file()


def users_dirs() -> tuple[list[Path], list[Path]]:
    """The user's folders of configurations: those searched before petl's own, those after it."""
    folder = working_dir_configs()
    if folder is None:
        return _added, []
    return (_added, [folder]) if is_complete(folder) else ([*_added, folder], [])


def users_dir() -> str:
    """The folder for a configuration of the user's own: that of `--config-dir`, or ./configs."""
    return str(_added[0]) if _added else f"./{IN_WORKING_DIR}"


def config_dirs() -> list[Path]:
    """The folders of configurations, in the order in which they are searched."""
    before, after = users_dirs()
    return [*before, config_dir(), *after]


class UsersFolders(SearchPathPlugin):
    """Puts the user's folders into Hydra's search path, around petl's own."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        before, after = users_dirs()
        for folder in before:
            # "main" is what Hydra calls the entry of the program's own configs
            own = SearchPathQuery(provider="main", path=None)
            search_path.prepend("user", f"file://{folder}", own)
        for folder in after:
            search_path.append("user", f"file://{folder}")


def search_users_dirs() -> None:
    """Let Hydra find the user's configurations."""
    Plugins.instance().register(UsersFolders)  # once: Hydra drops repetitions


def config_files() -> Iterator[tuple[Path, str]]:
    """Each folder of configurations with each name in it, such as "method/mola"."""
    for folder in config_dirs():
        for file in sorted(folder.glob("*/*.yaml")):
            if file.parent.name not in NOT_GROUPS:
                yield folder, f"{file.parent.name}/{file.stem}"


def log_conflicts() -> None:
    """Log, in one line, which files of the user's replace files of petl, or that none does."""
    before, after = users_dirs()
    own = config_dir()
    replaced = [
        f"{shown_path(folder)}/{name}.yaml"
        for folder, name in config_files()
        if folder in before and (own / f"{name}.yaml").is_file()
    ]
    if replaced:
        more = f" and {len(replaced) - 3} others" if len(replaced) > 3 else ""
        logger.info("used instead of petl's own of this name: %s%s", ", ".join(replaced[:3]), more)
    for folder in after:
        logger.info(
            "%s has a %s.yaml, which is not used, and petl's own configurations come first; "
            "--config-dir %s puts these first",
            shown_path(folder),
            CONFIG,
            shown_path(folder),
        )


def config_file(group: str, name: str) -> Path | None:
    """The YAML of a configuration such as method "mola", or None if no folder has one."""
    # in the order of the search, so the first is the one that Hydra takes
    files = (folder / group / f"{name}.yaml" for folder in config_dirs())
    return next((file for file in files if file.is_file()), None)


def raw(group: str, name: str) -> DictConfig:
    """Load the YAML file of one configuration, with nothing composed.

    Raises:
        InputError: it holds no names with values.
    """
    file = config_file(group, name)
    assert file is not None
    loaded = OmegaConf.load(file)
    if not isinstance(loaded, DictConfig):
        raise InputError(f"{shown_path(file)} holds no names with values, such as `r: 8`")
    return loaded


def preset_of(name: str) -> dict[str, Any]:
    """Return the settings in the YAML file of a method or loss; {} if there is no such file."""
    file = config_file("method", name) or config_file("loss", name)
    settings: Any = {} if file is None else OmegaConf.to_container(OmegaConf.load(file))
    return settings


def file_named(name: str) -> Path:
    """The YAML of a configuration such as "method/mola".

    Raises:
        InputError: there is none; the message suggests the closest matches.
    """
    group, _, stem = name.removesuffix(".yaml").rpartition("/")
    file = config_file(group, stem)
    if file is None:
        files = (file for folder in config_dirs() for file in folder.glob("*/*.yaml"))
        known = sorted({f"{file.parent.name}/{file.stem}" for file in files})
        raise InputError(f"no configuration {name!r}{did_you_mean(name, known)}")
    return file


def shown_path(file: Path) -> str:
    """The path of a YAML or folder for a message: from configs/ on, or in full.

    Petl's own begin with configs/, wherever petl is installed; those of ./configs with ./configs.
    """
    if file.is_relative_to(config_dir()):
        return str(Path("configs") / file.relative_to(config_dir()))
    here = Path.cwd()
    return f"./{file.relative_to(here)}" if file.is_relative_to(here) else str(file)


def options_of(group: str) -> list[str]:
    """Return the names of the configurations in a group such as "method"."""
    return sorted({file.stem for d in config_dirs() for file in (d / group).glob("*.yaml")})


def groups() -> set[str]:
    """Return the names of the groups of configurations: method, model, data, ..."""
    own = {path.name for path in config_dir().iterdir() if path.is_dir()}
    return (own | {name.partition("/")[0] for _, name in config_files()}) - NOT_GROUPS


def plus(group: str) -> str:
    """Return "+" for a group that the default configuration lacks, else ""."""
    return "" if group in DEFAULT_GROUPS else "+"
