"""What `petl check` reports: findings with a severity, and what could not be checked."""

from collections.abc import Iterable
from typing import NamedTuple

from petl.training.watch.findings import Finding, Severity


class Found(NamedTuple):
    """What a rule found: in words with a number, where, and what mends it."""

    what: str
    where: str = ""
    remedy: str = ""


class NotCheckedError(Exception):
    """What a rule raises if it cannot tell; the message is the reason."""


class Checked(tuple[Finding, ...]):
    """The findings of a check, errors first.

    Attributes:
        path: the folder or repository that was checked.
        kind: what it holds: "LoRA r 8, 7 blocks of 7".
        made_by: the program that wrote it, and where that stands; "": unknown.
        not_checked: pairs of a rule's id and the reason.
    """

    path: str
    kind: str
    made_by: str
    not_checked: tuple[tuple[str, str], ...]

    def __new__(
        cls,
        findings: Iterable[Finding],
        path: str = "",
        kind: str = "",
        made_by: str = "",
        not_checked: Iterable[tuple[str, str]] = (),
    ) -> "Checked":
        """Order the findings of a folder."""
        order = [*Severity][::-1]
        made = super().__new__(cls, sorted(findings, key=lambda f: order.index(f.severity)))
        made.path, made.kind, made.made_by = path, kind, made_by
        made.not_checked = tuple(not_checked)
        return made

    def count(self, severity: object) -> int:
        """Return the number of findings of a severity."""
        return sum(finding.severity == severity for finding in self)

    @property
    def ok(self) -> bool:
        """True if there are notes at most."""
        return all(finding.severity == Severity.NOTE for finding in self)

    def __str__(self) -> str:
        """One line: what was checked, and how many findings there are."""
        counts = [
            f"{number} {severity}{'s' * (number > 1)}"
            for severity in [*Severity][::-1]
            if (number := self.count(severity))
        ]
        made_by = [f"from {self.made_by}"] if self.made_by else []
        return f"{self.path}: {', '.join([self.kind, *made_by, *counts])}"

    def as_json(self) -> dict[str, object]:
        """Return everything as values of JSON."""
        return {
            "path": self.path,
            "kind": self.kind,
            "made_by": self.made_by,
            "findings": [finding._asdict() for finding in self],
            "not_checked": [{"id": name, "reason": reason} for name, reason in self.not_checked],
        }
