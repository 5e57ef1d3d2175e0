"""The table of all rules, and `check`, which asks each of them."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from petl.adapters.check import chat, contents, serving, with_base
from petl.adapters.check.findings import Checked, Finding, Found, NotCheckedError, Severity
from petl.adapters.check.folder import CONFIG, Subject, locate
from petl.adapters.export.engines import ENGINES
from petl.errors import InputError, choose

NOTE, WARNING, ERROR = Severity.NOTE, Severity.WARNING, Severity.ERROR


class Rule(NamedTuple):
    """A rule: GROUP.NAME, how much its findings weigh, and what finds them."""

    id: str
    severity: Severity
    find: Callable[[Subject], Iterator[Found]]


FORMAT = (  # others read what these have found to be right
    Rule("format.type", ERROR, contents.unknown_type),
    Rule("format.values", ERROR, contents.wrong_values),
    Rule("format.layout", ERROR, contents.foreign),
    Rule("format.weights", ERROR, contents.unreadable),
    Rule("format.link", ERROR, contents.links),
    Rule("format.code", ERROR, contents.code),
)
RULES = (
    Rule("format.scripts", NOTE, contents.scripts),
    Rule("keys.prefix", ERROR, contents.prefixes),
    Rule("keys.literal", ERROR, contents.literals),
    Rule("keys.target", ERROR, contents.strangers),
    Rule("keys.absent", WARNING, contents.absent),
    Rule("keys.pairs", ERROR, contents.unpaired),
    Rule("keys.ranks", ERROR, contents.ranks),
    Rule("keys.blocks", ERROR, contents.incomplete),
    Rule("dead.all", ERROR, contents.without_effect),
    Rule("dead.some", ERROR, contents.untrained),
    Rule("dead.finite", ERROR, contents.not_finite),
    Rule("dead.rows", ERROR, contents.constant),
    Rule("dead.norm", NOTE, contents.outliers),
    Rule("scale.alpha", ERROR, contents.no_alpha),
    Rule("scale.config", ERROR, contents.other_scale),
    Rule("base.fits", ERROR, with_base.misfit),
    Rule("base.adapted", ERROR, with_base.other_weights),
    Rule("base.others", NOTE, with_base.others_differ),
    Rule("base.name", NOTE, with_base.other_name),
    Rule("base.head", NOTE, with_base.same_head),
    Rule("base.effect", ERROR, with_base.effect),
    Rule("merge.loss", ERROR, with_base.rounded_off),
    Rule("merge.kept", NOTE, with_base.merges),
    Rule("tied.merge", WARNING, serving.tied),
    Rule("tied.gguf", ERROR, serving.tied_gguf),
    Rule("vocabulary.tokens", ERROR, chat.more_tokens),
    Rule("vocabulary.indices", ERROR, chat.tokens_beyond),
    Rule("template.missing", WARNING, chat.no_template),
    Rule("template.base", WARNING, chat.other_template),
    Rule("template.fails", ERROR, chat.fails),
    Rule("template.bos", ERROR, chat.two_starts),
    Rule("template.adds", NOTE, chat.added_start),
    Rule("stop.token", ERROR, chat.no_stop),
    Rule("dtype.range", WARNING, contents.near_overflow),
    Rule("engine.asked", ERROR, serving.misread),
    Rule("engine.others", NOTE, serving.engines),
    Rule("leftovers.files", WARNING, serving.leftovers),
    Rule("leftovers.newer", WARNING, serving.newer),
)


def check(
    path: str | Path,
    base: str | Path | None = None,
    engine: str | None = None,
    data: str | Path | None = None,
) -> Checked:
    """Check a saved adapter, wherever it was trained, for what makes it wrong without an error.

    Reads no pickle and runs no code, and no model is loaded without a `base`.

    Args:
        path: folder of an adapter or of a run, or the name of a repository on the Hub.
        base: folder or name of the model that it was trained on, to compare with.
        engine: what is to serve it: vllm, sglang, llama.cpp, peft or petl.
        data: JSON Lines with rows of the training, such as chats.

    Raises:
        InputError: there is no adapter, or its config is no JSON.
    """
    if engine is not None:
        choose(ENGINES, engine, "engine")
    subject = locate(
        str(path),
        base=None if base is None else str(base),
        engine=engine,
        data=None if data is None else Path(data),
    )
    if not subject.has(CONFIG) and not contents.layout_of(subject):
        reason = subject.links.get(CONFIG, f"{path} contains no adapter: {CONFIG} is missing")
        raise InputError(reason)
    findings, not_checked = asked(FORMAT, subject)
    wrong = {finding.id for finding in findings} & {"format.type", "format.values", "format.layout"}
    if wrong:
        not_checked.append(("all others", "the config cannot be used"))
        kind = contents.layout_of(subject) or subject.kind
        return Checked(findings, str(path), kind, "", not_checked)
    others, reasons = asked(RULES, subject)
    return Checked(
        findings + others,
        str(path),
        subject.described(),
        subject.made_by(),
        not_checked + reasons,
    )


def asked(rules: Sequence[Rule], subject: Subject) -> tuple[list[Finding], list[tuple[str, str]]]:
    """Return the findings of rules, and which of them cannot tell, with the reason."""
    findings, not_checked = [], []
    for rule in rules:
        try:
            found = [*rule.find(subject)]
        except (NotCheckedError, InputError) as reason:
            not_checked.append((rule.id, str(reason)))
            continue
        findings += [Finding(rule.id, rule.severity, *each) for each in found]
    return findings, not_checked
