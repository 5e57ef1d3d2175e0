"""The verdicts on claims of papers that were tried here, from verdicts.json.

`python scripts/claims.py NAME` tries a claim; docs/claims.md says how, and shows all of them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("verdicts.json")  # written by scripts/build_docs.py


@dataclass(frozen=True)
class ClaimVerdict:
    """A statement with its verdict.

    Attributes:
        claim: its name, for scripts/claims.py.
        methods: that it is about; none of a statement about settings.
        difference: mean and 95 % interval, with their unit.
    """

    claim: str
    methods: Sequence[str]
    statement: str
    verdict: str
    difference: str


def tried() -> list[ClaimVerdict]:
    """Return all statements that were tried."""
    # shipped with the package, so it is trusted
    rows: list[dict[str, Any]] = json.loads(FILE.read_text())
    return [ClaimVerdict(**row) for row in rows]


def verdict_lines(method: str) -> list[str]:
    """Return a line for each statement about a method."""
    return [
        f"tried: {each.statement}: {each.verdict}, {each.difference}"
        for each in tried()
        if method in each.methods
    ]
