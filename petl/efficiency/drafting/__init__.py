"""Drafting: faster generation of a model, adapted or not, with its output unchanged.

    drafter = petl.drafting.drafter("free", model=model)
    model.generate(**inputs, custom_generate=petl.drafting.decode, drafter=drafter)

A drafter guesses tokens ahead; the model verifies several guesses in one pass. In float32 the
answer is that of plain decoding; in 16 bits every token is the one that the model chose for exactly
the text before it, and the answer may be another, equally good one.
"""

from importlib import import_module
from pkgutil import iter_modules

from petl.efficiency.drafting.answers import DraftAnswers, answers
from petl.efficiency.drafting.calls import why_plain
from petl.efficiency.drafting.checks import PROMISE, check_answer, rounding, shortfalls, verify
from petl.efficiency.drafting.costs import Costs
from petl.efficiency.drafting.engine import Stats, decode
from petl.efficiency.drafting.fit import fit
from petl.efficiency.drafting.folder import load_drafter
from petl.efficiency.drafting.registry import (
    Draft,
    Drafter,
    Needs,
    PassOutput,
    Root,
    drafter,
    list_drafters,
    register,
)
from petl.efficiency.drafting.tree import best, plan, tau

__all__ = [
    "PROMISE",
    "Costs",
    "Draft",
    "DraftAnswers",
    "Drafter",
    "Needs",
    "PassOutput",
    "Root",
    "Stats",
    "answers",
    "best",
    "check_answer",
    "decode",
    "drafter",
    "fit",
    "list_drafters",
    "load_drafter",
    "plan",
    "register",
    "rounding",
    "shortfalls",
    "tau",
    "verify",
    "why_plain",
]

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
