"""What local files and the hub share: which columns are read, and what is made of them."""

from abc import ABC
from dataclasses import dataclass

from datasets import Dataset

from petl.data.base import RawData, TextSource, check_share, cut, hold_out, shuffled
from petl.data.rows import Rows, conversation, label, numbered, passage, text
from petl.errors import InputError
from petl.tasks import CausalLM, Classification


@dataclass(kw_only=True)
class Tabular(TextSource, ABC):
    """Rows in columns whose names the settings give."""

    text: str = "text"
    label: str = "label"
    messages: str | None = None  # conversations, in place of text
    pack: bool = False  # texts end to end, cut into blocks of max_length; each sees itself only
    test_share: float = 0.1  # of the training rows, held out when there are no test rows

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self.test_share)
        if self.task == "classification" and self.messages is not None:
            raise InputError(
                f"data.messages={self.messages} is for conversations: add data.task=causal_lm"
            )
        if self.pack and (self.task == "classification" or self.messages is not None):
            raise InputError("data.pack=true is for plain text with data.task=causal_lm")

    def columns(self) -> list[str]:
        """The columns that are read."""
        if self.task == "classification":
            return [self.text, self.label]
        return [self.messages or self.text]

    def assemble(self, train: Rows, test: Rows | None) -> RawData:
        """Checked, shuffled and cut rows; without `test` a share of `train` is held out."""
        whole = train
        if test is None:
            train, test = self.hold_out(train)
        train = train.take(cut(shuffled(len(train), self.seed), self.train_rows, "train_rows"))
        test = test.take(cut(shuffled(len(test), self.seed), self.test_rows, "test_rows"))
        if self.task == "classification":
            return self.labelled(whole, train, test)
        name, parse = ("messages", conversation) if self.messages else ("text", passage)
        (column,) = self.columns()
        splits = [Dataset.from_dict({name: rows.column(column, parse)}) for rows in (train, test)]
        task = CausalLM(max_length=self.max_length, chat=self.messages is not None, pack=self.pack)
        return RawData(task, *splits, name=self.name)

    def hold_out(self, rows: Rows) -> tuple[Rows, Rows]:
        """What to train on and what to test on, drawn by the seed."""
        kept, held = hold_out(len(rows), self.test_share, self.seed, rows.origin)
        return rows.take(kept), rows.take(held)

    def labelled(self, whole: Rows, train: Rows, test: Rows) -> RawData:
        """Texts with the numbers of their classes, which are those of `whole`."""
        classes = whole.classes or in_order(whole.column(self.label, label))
        if len(classes) < 2:
            raise InputError(f"{whole.origin} has one class only, {classes[0]!r}, in {self.label}")
        number = {name: i for i, name in enumerate(classes)}

        def split(rows: Rows) -> Dataset:
            names = rows.column(self.label, numbered(rows.classes) if rows.classes else label)
            strange = sorted(set(names) - set(classes))
            if strange:
                shown = ", ".join(repr(name) for name in strange[:10])
                first = min(
                    n for n, name in zip(rows.numbers, names, strict=True) if name in strange
                )
                raise InputError(
                    f"{rows.origin} has labels that {whole.origin} lacks: {shown} "
                    f"({rows.unit} {first}); add rows of them to train on, or leave them out"
                )
            texts = rows.column(self.text, text)
            return Dataset.from_dict({"text": texts, "label": [number[name] for name in names]})

        task = Classification(classes=classes, max_length=self.max_length)
        return RawData(task, split(train), split(test), name=self.name)


def in_order(labels: list[str]) -> list[str]:
    """The distinct labels, numbers by value and names by alphabet."""
    names = set(labels)
    if all(name.removeprefix("-").isdecimal() for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)
