"""Data sets of the Hugging Face hub, or of its local cache when there is no network."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import ClassLabel, Features, load_dataset
from datasets.exceptions import DatasetsError

from petl.data.base import RawData
from petl.data.tabular import Tabular
from petl.data.validation import PassingRows, Row, Rows, require
from petl.errors import InputError, first_line
from petl.files import hub


@dataclass(kw_only=True)
class Hub(Tabular):
    """Rows of splits on the hub; code that a data set brings is never run."""

    config: str | None = None  # of the data set, where it has several
    revision: str | None = None  # branch, tag or commit
    train_split: str = "train"
    test_split: str | None = None  # None: test_share of the training rows is held out

    def read(self) -> RawData:
        test = self.rows(self.test_split) if self.test_split else None
        if self.streaming:
            classes = self.classes(self.load(self.train_split, streaming=True).features)
            return self.stream(
                PassingRows(self.origin, self.placed, self.train_rows, classes), test
            )
        return self.assemble(self.rows(self.train_split), test)

    def rows(self, split: str) -> Rows:
        """One split, as far as its columns are asked for."""
        origin = f"{self.name} ({split})"
        loaded = self.load(split)
        require(self.columns(), loaded.column_names, origin)
        if len(loaded) == 0:
            raise InputError(f"{origin} has no rows")
        kept = loaded.select_columns(self.columns())
        return Rows(origin, "row", range(len(kept)), kept, self.classes(loaded.features))

    def classes(self, features: Features | None) -> list[str] | None:
        """The names of the classes, if the data set has them."""
        feature = (features or {}).get(getattr(self.form, "column", ""))
        feature = getattr(feature, "feature", feature)  # of lists: that of an item
        return list(feature.names) if isinstance(feature, ClassLabel) else None

    @property
    def origin(self) -> str:
        return f"{self.name} ({self.train_split})"

    def placed(self, columns: Sequence[str]) -> Iterator[tuple[str, Row]]:
        """The train rows as they arrive, and where each stands."""
        loaded = self.load(self.train_split, streaming=True)
        if loaded.features is not None:  # else they are known with the first row
            require(columns, loaded.features, self.origin)
            loaded = loaded.select_columns(list(columns))
        for number, row in enumerate(loaded):
            require(columns, row, self.origin)
            yield f"{self.origin}, row {number}", {name: row[name] for name in columns}

    def load(self, split: str, *, streaming: bool = False) -> Any:
        """One split with all its columns: a Dataset, or an IterableDataset if it is `streaming`."""
        online = hub.reachable("dataset", self.name, self.revision)
        try:
            with hub.offline(not online):
                return load_dataset(
                    self.name,
                    self.config,
                    split=split,
                    revision=self.revision,
                    streaming=streaming,
                )
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            if not online and isinstance(error, OSError):
                raise hub.not_to_be_had("dataset", self.name) from error
            raise InputError(f"data set {self.name}: {first_line(error)}") from error
