"""Data sets of the Hugging Face Hub, or of its local cache when there is no network."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Features, Image, List, load_dataset
from datasets.exceptions import DatasetsError
from datasets.features.features import FeatureType

from petl.data.base import RawData
from petl.data.tabular import Tabular
from petl.data.validation import FOLDER, Choose, LazySourceRows, Row, SourceRows, from_table
from petl.errors import InputError, first_line
from petl.system.files import hub


@dataclass(kw_only=True)
class HubData(Tabular):
    """Splits of a data set on the Hub; code inside a data set is never run."""

    config: str | None = None  # name of a configuration, for data sets with several
    revision: str | None = None  # branch, tag or commit
    train_split: str = "train"
    test_split: str | None = None  # None: test_share of the training rows is held out

    def read(self) -> RawData:
        """Load the splits; with `streaming` the train rows are loaded later."""
        test = self.rows(self.test_split) if self.test_split else None
        if self.streaming:
            # features are known before the first row
            classes = self.classes(self.load(self.train_split, streaming=True).features)
            return self.stream(
                LazySourceRows(
                    self.origin,
                    self.located_rows,
                    self.train_rows,
                    classes,
                    whole=lambda: self.load(self.train_split, streaming=True),
                ),
                test,
            )
        return self.assemble(self.rows(self.train_split), test)

    def rows(self, split: str) -> SourceRows:
        """Load the columns that the task reads of one split."""
        origin = f"{self.name} ({split})"
        loaded = self.load(split)
        columns = self.columns_of(self.task_columns.choose, loaded.column_names, origin)
        if len(loaded) == 0:
            raise InputError(f"{origin} has no rows")
        return SourceRows(
            origin,
            range(len(loaded)),
            # others may hold images or audio, which would be decoded
            loaded.select_columns(columns),
            locate=lambda number: f"{origin}, row {number}",
            classes=self.classes(loaded.features),
            whole=lambda: loaded,
        )

    def classes(self, features: Features | None) -> list[str] | None:
        """The names of the classes, if the label column has the type ClassLabel."""
        feature = (features or {}).get(getattr(self.task_columns, "column", ""))
        feature = getattr(feature, "feature", feature)  # of a list: the type of its items
        return list(feature.names) if isinstance(feature, ClassLabel) else None

    @property
    def origin(self) -> str:
        """Name and training split, for messages."""
        return f"{self.name} ({self.train_split})"

    def located_rows(self, choose: Choose) -> Iterator[tuple[str, Row]]:
        """Yield the train rows as they arrive, each with its location for messages."""
        loaded = self.load(self.train_split, streaming=True)
        if loaded.features is not None:  # else only the rows tell the columns, see below
            loaded = loaded.select_columns(self.columns_of(choose, loaded.features, self.origin))
        for number, row in enumerate(loaded):
            columns = self.columns_of(choose, row, self.origin)
            yield f"{self.origin}, row {number}", from_table({name: row[name] for name in columns})

    def columns_of(self, choose: Choose, present: Iterable[str], origin: str) -> list[str]:
        """The columns that `choose` returns, without the folder of a file."""
        return [name for name in choose(present, origin) if name != FOLDER]

    def load(self, split: str, *, streaming: bool = False) -> Any:
        """Load one split with all columns: a Dataset, or with `streaming` an IterableDataset.

        Raises:
            InputError: the data set cannot be loaded, or there is no network and it is not cached.
        """
        online = hub.reachable("dataset", self.name, self.revision)
        try:
            # without this, `datasets` retries the Hub before it reads the cache
            with hub.offline(not online):
                loaded = load_dataset(
                    self.name,
                    self.config,
                    split=split,
                    revision=self.revision,
                    streaming=streaming,
                )
                for name, feature in (loaded.features or {}).items():
                    if undecoded(feature) != feature:
                        loaded = loaded.cast_column(name, undecoded(feature))
                return loaded
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            if not online and isinstance(error, OSError):
                raise hub.unavailable("dataset", self.name) from error
            raise InputError(
                f"data set {self.name} cannot be loaded: {first_line(error)}"
            ) from error


def undecoded(feature: FeatureType) -> FeatureType:
    """The type of a column whose images stay files: their bytes, or a path."""
    if isinstance(feature, Image):
        return Image(decode=False)
    return List(undecoded(feature.feature)) if isinstance(feature, List) else feature
