"""Findings of a check by id; those of a watcher, their log lines, the error, and the report."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from petl.errors import InputError

logger = logging.getLogger("petl.watch")
LEVELS = {"error": logging.ERROR, "warning": logging.WARNING, "note": logging.INFO}
IDS = (
    "labels", "eos", "bos", "truncated", "same rows", "coverage", "gradient", "input",
    "optimizer", "base", "mode", "weights", "reference", "resume", "best",
)  # fmt: skip


class Severity(StrEnum):
    """How much a finding weighs."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


class Finding(NamedTuple):
    """One matter: what was found, with a number, and what mends it.

    Attributes:
        id: of the check: one of IDS, or GROUP.NAME of `petl check`.
        severity: how much it weighs.
        what: the matter, with a number.
        where: a file or tensor; "" where `what` says it.
        remedy: the command or argument that mends it.
    """

    id: str
    severity: Severity
    what: str
    where: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.id}: {self.what}" + (f"; {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Report:
    """The findings so far, and which checks could not be made yet.

    Attributes:
        findings: in the order in which they were found.
        metrics: shares in [0, 1], by the name that they have in a log.
        not_checked: ids of checks for which something was missing, such as a tokenizer.
    """

    findings: tuple[Finding, ...]
    metrics: dict[str, float]
    not_checked: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """True without a finding above a note."""
        return all(finding.severity == "note" for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{finding.severity:8} {finding}" for finding in self.findings]
        lines += [f"{'':8} {name}: {share:.3f}" for name, share in self.metrics.items()]
        if self.not_checked:
            lines.append(f"{'':8} not checked: {', '.join(self.not_checked)}")
        return "\n".join(lines)


class Findings:
    """Collects findings: notes and warnings go to the log, errors are raised by `settle`.

    Args:
        on: "raise", or "warn": errors go to the log as well.
        ignore: ids of checks that are left out.

    Raises:
        InputError: another value of `on`, or an id that is none.
    """

    def __init__(self, on: str = "raise", ignore: Iterable[str] = ()) -> None:
        self.on, self.ignore = on, tuple([ignore] if isinstance(ignore, str) else ignore)
        if on not in ("raise", "warn"):
            raise InputError(f"on={on!r}: choose 'raise' or 'warn'")
        unknown = [name for name in self.ignore if name not in IDS]
        if unknown:
            raise InputError(f"ignore has {unknown[0]!r}; the checks are {', '.join(IDS)}")
        self.found: list[Finding] = []
        self.metrics: dict[str, float] = {}
        self.checked: set[str] = set()
        self.is_early = True  # nothing is lost yet: an error may end the run
        self.speaks = True  # False in all processes but the first
        self._raised: list[Finding] = []

    def wants(self, name: str) -> bool:
        """Return False for a check that is ignored; the others count as made from here on."""
        if name in self.ignore:
            return False
        self.checked.add(name)
        return True

    def add(self, name: str, severity: str, what: str, remedy: str = "") -> None:
        """Add a finding, unless its check is ignored or it is known; its check counts as made."""
        finding = Finding(name, Severity(severity), what, remedy=remedy)
        if not self.wants(name) or finding in self.found:
            return
        self.found.append(finding)
        if severity == "error" and self.on == "raise" and self.is_early:
            self._raised.append(finding)
        elif self.speaks:
            logger.log(LEVELS[severity], "%s", finding)

    def settle(self) -> None:
        """Raise InputError if there are errors that are neither raised nor in the log."""
        errors, self._raised = self._raised, []
        if errors:
            ids = tuple(dict.fromkeys(finding.id for finding in errors))
            raise InputError(
                f"{'. '.join(map(str, errors))}. To train nevertheless: ignore={ids!r}, or "
                "on='warn'"
            )

    def report(self) -> Report:
        """Return what is known so far."""
        left = tuple(name for name in IDS if name not in self.checked)
        return Report(tuple(self.found), dict(self.metrics), left)
