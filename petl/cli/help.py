"""What `python train.py --help` says: how a run is chosen, and every setting with its comment."""

import textwrap

from petl.config.compose import config_dir, groups, options_of, plus

WIDTH = 100
GROUPS = ("method", "loss", "model", "data", "tracker", "launch", "search")  # in this order
MEANS = {
    "method": "what is trained; a run needs one. petl methods lists them, petl show NAME explains",
    "loss": "an extra loss, beside any method",
    "model": "what is adapted",
    "data": "what it learns from",
    "tracker": "where its figures go besides the run's folder",
    "launch": "how several processes share the work, under torchrun",
    "search": "several runs that look for the best settings",
}
TEXT = """\
Train one adapter and save it:  python train.py +method=NAME [GROUP=NAME ...] [SETTING=VALUE ...]

  python train.py +method=mola
  python train.py +method=lora model=smollm2 data=hamlet train.steps=60 method.r=4
  python train.py -m +method=lora,mola train.seed=0,1,2     one run for each combination

GROUP=NAME takes a file of configs/GROUP, whose settings are GROUP.SETTING=VALUE. A method of your
own: install a package with an entry point petl.methods, or add imports=[MODULE]; its YAML is
DIR/method/NAME.yaml, with --config-dir DIR.

{groups}

SETTINGS of any run, from configs/train.yaml:

{settings}

Before a run:  petl plan +method=NAME ...  (size, memory, length)  and  petl data ...  (rows).
--cfg job prints the settings as they would be; --hydra-help tells of Hydra's own options.
"""


def text() -> str:
    """The whole of it."""
    known = [*GROUPS, *sorted(groups() - {*GROUPS})]
    return TEXT.format(groups="\n".join(map(config_field, known)), settings=settings())


def config_field(group: str) -> str:
    """A group, what it is for, and what there is in it."""
    head = f"  {plus(group)}{group}=NAME".ljust(18) + MEANS.get(group, "")
    names = ", ".join(options_of(group))
    inside = textwrap.fill(names, WIDTH, initial_indent=" " * 18, subsequent_indent=" " * 18)
    return f"{head}\n{inside}"


def settings() -> str:
    """The settings under `train`, as their file lists them."""
    lines = (config_dir() / "train.yaml").read_text().splitlines()
    start = lines.index("train:")
    length = next(i for i, line in enumerate(lines[start + 1 :]) if line and line[0] != " ")
    return "\n".join(lines[start : start + 1 + length]).rstrip()
