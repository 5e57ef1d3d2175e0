"""A rule of `petl check`, and how rules are asked."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import Subject
from petl.errors import InputError
from petl.training.watch.findings import Finding, Severity


class CheckRule(NamedTuple):
    """A rule: GROUP.NAME, how much its findings weigh, what finds them, and what mends them."""

    id: str
    severity: Severity
    find: Callable[[Subject], Iterator[Found]]
    remedy: str = ""


def asked(
    rules: Sequence[CheckRule], subject: Subject
) -> tuple[list[Finding], list[tuple[str, str]]]:
    """Return the findings of rules, and which of them cannot tell, with the reason."""
    findings, not_checked = [], []
    for rule in rules:
        try:
            found = [*rule.find(subject)]
        except (NotCheckedError, InputError) as reason:
            not_checked.append((rule.id, str(reason)))
            continue
        for what, where, remedy in found:
            findings.append(Finding(rule.id, rule.severity, what, where, remedy or rule.remedy))
    return findings, not_checked
