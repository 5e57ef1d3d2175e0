"""The text of `petl train --help`: usage, the config groups, and all settings of a run."""

import textwrap

from petl.system.settings.command_line import config_dir, groups, options_of, plus

WIDTH = 100
GROUPS = (
    "method",
    "ranks",
    "loss",
    "model",
    "data",
    "task",
    "tracker",
    "launch",
    "search",
    "tokens",
)  # in this order
MEANINGS = {
    "method": "the adapter method (required); see petl methods, petl show NAME",
    "ranks": "ranks by the importance of blocks, for methods with rank_pattern",
    "loss": "an extra loss, for any method",
    "model": "the base model",
    "data": "the data set and task",
    "task": "learning from preferences and rewards",
    "tracker": "where metrics are logged, besides the folder of the run",
    "launch": "how several processes train together, under torchrun",
    "tokens": "fewer tokens in attention, for long rows",
    "search": "a search for the best settings: several runs",
}
TEXT = """\
Train one adapter and save it:  petl train +method=NAME [GROUP=NAME ...] [SETTING=VALUE ...]

  petl train +method=mola
  petl train +method=lora model=smollm2 data=hamlet train.steps=60 method.r=4
  petl train -m +method=lora,mola train.seed=0,1,2        # one run for each combination
  torchrun --nproc_per_node 2 -m petl train +method=mola  # two processes, for instance two GPUs

In a checkout, `python train.py` is the same.

GROUP=NAME loads configs/GROUP/NAME.yaml; GROUP.SETTING=VALUE overrides one of its settings.
Your own files are found in ./configs of the working directory, and in DIR with --config-dir DIR;
`petl configs method/mola` prints one to start from.
A method of your own: install a package with an entry point petl.methods, or add imports=[MODULE].

{groups}

SETTINGS of all runs, from configs/train.yaml:

{settings}

Before a run:  petl plan +method=NAME ...  (size, memory, length)  and  petl data ...  (examples).
--cfg job prints the composed configuration; --hydra-help lists the options of Hydra.
"""


def text() -> str:
    """Return the help text of `petl train`."""
    names = [*GROUPS, *sorted(groups() - {*GROUPS})]  # the user's own groups come last
    return TEXT.format(groups="\n".join(map(describe_group, names)), settings=settings())


def describe_group(group: str) -> str:
    """Return usage, meaning and options of a config group."""
    # wide enough for every group of petl
    head = f"  {plus(group)}{group}=NAME".ljust(18) + MEANINGS.get(group, "")
    names = ", ".join(options_of(group))
    options = textwrap.fill(names, WIDTH, initial_indent=" " * 18, subsequent_indent=" " * 18)
    return f"{head}\n{options}"


def settings() -> str:
    """Return the settings under `train` with their comments, as configs/train.yaml lists them."""
    lines = (config_dir() / "train.yaml").read_text().splitlines()
    start = lines.index("train:")
    # the block ends at the next line that is not indented: another block follows in the file
    length = next(i for i, line in enumerate(lines[start + 1 :]) if line and line[0] != " ")
    return "\n".join(lines[start : start + 1 + length]).rstrip()
