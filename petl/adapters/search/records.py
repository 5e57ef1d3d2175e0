"""The settings, the file and the result of `petl squeeze`."""

from dataclasses import dataclass

from petl.adapters.search.evolve import Evolution, State

SEARCH, PICTURE = "squeeze.json", "squeeze.png"


@dataclass(frozen=True)
class SearchSettings:
    """The settings of a search, which are the same when it is resumed.

    Attributes:
        what: "density", "rank" or "bits".
        bytes: the largest size of the file of weights.
        metric: "kl", the divergence from the adapter as it was, or "loss".
        rows: calibration rows at most.
        offspring: candidates of a generation.
        seed: of the calibration rows and of the mutations.
    """

    what: str
    bytes: int
    metric: str = "kl"
    rows: int = 512
    offspring: int = 32
    seed: int = 0


@dataclass(frozen=True)
class SearchRecord:
    """The content of squeeze.json.

    Attributes:
        adapter: SHA-256 of the file of weights that is squeezed.
        settings: of the search.
        units: names of the units.
        values: of each unit, the setting that each level stands for.
        even: the even state within the budget.
        even_fitness: of it, on all calibration positions.
        curve: bytes and fitness of states in which all units have one level.
        search: the search; None before the first generation, and if there is nothing to search.
    """

    adapter: str
    settings: SearchSettings
    units: list[str]
    values: list[list[int | float]]
    even: list[int]
    even_fitness: float
    curve: list[list[float]]
    search: Evolution | None = None


@dataclass(frozen=True)
class SearchResult:
    """The result of `squeeze`.

    Attributes:
        record: what squeeze.json holds.
        found: the best state; the even one if the search found no better.
        fitness: of that state.
        bytes: size of the written file.
        even_bytes: largest size of the file of the even state.
        calibration: what the calibration rows are.
        table: of each unit its name, and value and bytes in the even and the found state.
        scores: on the test rows, of "original", "even" and "found".
        metric: name of the score that tells how good an adapter is.
    """

    record: SearchRecord
    found: State
    fitness: float
    bytes: int
    even_bytes: int
    calibration: str
    table: list[tuple[str, float, int, float, int]]
    scores: dict[str, dict[str, float]]
    metric: str
