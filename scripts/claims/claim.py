"""Claims: what a paper says, the contenders that try it, and the data, as descriptions."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from petl.sweeps.study import Contender

MARGIN = 0.01  # of accuracy: smaller differences are no reason to choose a method


@dataclass(frozen=True)
class Statement:
    """A comparison of two contenders, or of two gains.

    Attributes:
        says: the statement in one line.
        kind: "beats": the first has the higher score; "equals": their scores differ by less than
            the margin.
        first: words of a contender, see `petl.sweeps.study.Contender`.
        second: words of the contender that it is compared with.
        than: two contenders whose difference is subtracted: the statement is about how much larger
            the difference of `first` and `second` is than theirs.
        margin: the difference in the score from which on it matters; chosen before the runs.
    """

    says: str
    kind: Literal["beats", "equals"]
    first: str
    second: str
    than: tuple[str, str] | None = None
    margin: float = MARGIN

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


@dataclass(frozen=True)
class Setting:
    """The data and settings of all runs of a claim.

    Attributes:
        name: of the folder, which claims with the same setting share, so that a contender of
            several claims is trained once.
        title: the task in words.
        overrides: settings of `petl train`.
        rates: learning rates to choose from on validation examples, the same for all contenders.
        seeds: of the runs that are compared.
    """

    name: str
    title: str
    overrides: tuple[str, ...]
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass(frozen=True)
class Claim:
    """What a paper claims, and how it is tried.

    Attributes:
        name: on the command line.
        title: the claim in one line.
        paper: its source.
        paper_says: the claim and the evidence of the source, in our words.
        statements: what is compared.
        setting: data and settings.
        labels: names of the contenders in tables, by their words; all of them have one.
        pages: methods whose pages quote the verdicts.
        shown: heat maps.
        limits: sentences on what the trial does not cover.
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
    limits: tuple[str, ...] = field(default=())

    @property
    def contenders(self) -> list[Contender]:
        """The contenders in the order in which the statements name them."""
        return [Contender(words) for words in dict.fromkeys(self._named())]

    def _named(self) -> Iterator[str]:
        for statement in self.statements:
            for words, _ in statement.signs:
                yield words


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
