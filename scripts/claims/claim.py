"""Claims: what a paper says, the contenders that try it, and the data, as descriptions.

A contender is given by words: those of a method and settings of `petl train`, as
`petl.experiments.sweeps.study.Contender` takes them. An edited contender is what `claims.edits`
makes of a trained one: "lora | prune drop=0.9 q=dare". One of several trained ones, each of another
task, is what `claims.several` makes of them: "lora on=verbs + lora on=reviews | own".
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from claims.measures import ACCURACY, Measure
from petl.experiments.sweeps.study import TUNING_SEEDS, Contender

MARGIN = 0.01  # of accuracy: smaller differences are no reason to choose a method
EDIT, AND = " | ", " + "
Kind = Literal["beats", "equals", "no_worse", "share"]
LADDER = tuple(float(f"{digit}e{power}") for power in range(-7, 1) for digit in (1, 3))  # rates
ONCE = tuple(range(5))  # seeds of a first look; of a second one, twice as many
BEYOND = 3  # rates on each side of the middle one: the first is tried at once, two if need be


def made_of(words: str) -> list[str]:
    """Return the words of the trained contenders that one is made of: of a trained one, its own."""
    return words.partition(EDIT)[0].split(AND)


@dataclass(frozen=True)
class Statement:
    """A comparison of two contenders, or of two gains.

    Attributes:
        says: the statement in one line.
        kind: "beats": the first is better; "equals": they differ by less than the margin;
            "no_worse": the first is not worse by the margin; "share": the first has at most a share
            of the second, for measures that are compared by ratio.
        first: words of a contender.
        second: words of the contender that it is compared with.
        than: two contenders whose difference is subtracted: the statement is about how much larger
            the difference of `first` and `second` is than theirs.
        margin: the difference in the measure from which on it matters, or the share; chosen before
            the runs.
        measure: what is compared.
        paper: the difference that the paper reports, on its models and tasks, in points of accuracy
            or as a ratio; None: it has none in these terms.
    """

    says: str
    kind: Kind
    first: str
    second: str
    than: tuple[str, str] | None = None
    margin: float = MARGIN
    measure: Measure = ACCURACY
    paper: float | None = None

    def __post_init__(self) -> None:
        if (self.kind == "share") != self.measure.ratio:
            raise ValueError(f"kind={self.kind!r} does not fit the measure {self.measure.name}")

    @property
    def border(self) -> float:
        """The margin on the scale on which the measure is compared."""
        return math.log(self.margin) if self.measure.ratio else self.margin

    @property
    def key(self) -> str:
        """What is compared, by which files of results name their estimates."""
        first, second = self.first, self.second
        if self.than is not None:
            first, second = f"({first} minus {second})", f"({self.than[0]} minus {self.than[1]})"
        return f"{self.measure.name}: {first} minus {second}"

    @property
    def signs(self) -> list[tuple[str, int]]:
        """The contenders with the signs of their scores in the difference."""
        found = [(self.first, 1), (self.second, -1)]
        return found if self.than is None else [*found, (self.than[0], -1), (self.than[1], 1)]


@dataclass(frozen=True)
class Shown:
    """A heat map of a contender that the page shows, averaged over the seeds.

    Attributes:
        title: what it shows, in one line.
        words: of the contender.
        heat_map: name of the heat map in heat_maps.json of a run.
    """

    title: str
    words: str
    heat_map: str


def around(rate: float) -> tuple[float, ...]:
    """Return the learning rates of a search that begins around one of `LADDER`, in order."""
    middle = LADDER.index(rate)
    return LADDER[middle - BEYOND : middle + BEYOND + 1]


@dataclass(frozen=True)
class Setting:
    """The data and settings of all runs of a claim.

    Attributes:
        name: of the folder, which claims with the same setting share, so that a contender of
            several claims is trained once.
        title: the task in words.
        overrides: settings of `petl train`; in them and in the words of contenders, {data} stands
            for the folder of the files.
        rates: learning rates to choose from on validation examples, the same for all contenders:
            the middle three, and those beyond them while the best one is at an end.
        seeds: of the runs that are compared: ONCE, or twice as many for a claim of which a
            statement could not be told with ONCE.
        limits: sentences on what no trial with this setting covers.
        write_files: writes the files of the data to a new folder; None: there are none.
        also_on: files whose rows each finished run is scored on too, by name; see
            `claims.measures.loss_on`.
        stands_for: settings of `petl train` that a word of a contender stands for, such as
            "on=verbs" for the data of a task.
        tuning_seeds: that choose a rate, as of `Study`.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...] = around(1e-3)
    seeds: tuple[int, ...] = ONCE
    limits: tuple[str, ...] = ()
    write_files: Callable[[Path], None] | None = None
    also_on: tuple[str, ...] = ()
    stands_for: dict[str, tuple[str, ...]] = field(default_factory=dict)
    tuning_seeds: int = TUNING_SEEDS


@dataclass(frozen=True)
class Claim:
    """What a paper claims, and how it is tried.

    Attributes:
        name: on the command line.
        title: the claim in one line.
        paper: its source; "" for what these pages promise.
        paper_says: the claim and the evidence of the source, in our words.
        statements: what is compared.
        setting: data and settings.
        labels: names of the contenders in tables, by their words; all of them have one.
        pages: methods, and how-tos by their file, whose pages quote the verdicts: a method those of
            the statements about it, a how-to all.
        shown: heat maps.
        limits: sentences on what the trial does not cover, beside those of the setting.
        beside: words of contenders that no statement compares and that the table shows.
        since: words of the contender from which the table counts all measures but the first, such
            as the untrained model; "": it does not.
    """

    name: str
    title: str
    paper: str
    paper_says: str
    statements: tuple[Statement, ...]
    setting: Setting
    labels: dict[str, str]
    pages: tuple[str, ...]
    shown: tuple[Shown, ...] = ()
    limits: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    since: str = ""

    def __post_init__(self) -> None:
        if self.edited and self.setting.also_on:
            raise ValueError(f"{self.name}: edited adapters are scored on the test rows alone")

    @property
    def contenders(self) -> list[Contender]:
        """All contenders in the order in which the statements name them, then those beside."""
        return [Contender(words) for words in dict.fromkeys(self._named())]

    @property
    def trained(self) -> list[Contender]:
        """The contenders that are trained, and those that the edited ones are made of."""
        words = dict.fromkeys(part for each in self.contenders for part in made_of(each.words))
        return [Contender(each) for each in words]

    @property
    def edited(self) -> list[Contender]:
        """The contenders that are made of trained ones."""
        return [each for each in self.contenders if EDIT in each.words]

    @property
    def measures(self) -> list[Measure]:
        """What the statements compare, each once."""
        return list({each.measure.name: each.measure for each in self.statements}.values())

    @property
    def alone(self) -> bool:
        """True if runs have to train one at a time, for what a statement compares."""
        return any(each.alone for each in self.measures)

    @property
    def groups(self) -> list[list[Contender]]:
        """The contenders in the order of their making: those of a group are trained seed by seed.

        All of them if runs are timed; else each is finished before the next one.
        """
        trained = [self.trained] if self.alone else [[each] for each in self.trained]
        return [*trained, *([each] for each in self.edited)]

    def _named(self) -> Iterator[str]:
        for statement in self.statements:
            for words, _ in statement.signs:
                yield words
        yield from self.beside


@dataclass(frozen=True)
class Untried:
    """A claim without a description yet.

    Attributes:
        takes: what trying it takes.
    """

    name: str
    title: str
    paper: str
    takes: str
