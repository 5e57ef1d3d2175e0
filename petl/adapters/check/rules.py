"""The table of all rules, and `check`, which asks each of them."""

from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from petl.adapters.check import chat, contents, serving, with_base
from petl.adapters.check.findings import Checked, NotCheckedError
from petl.adapters.check.folder import CONFIG, locate
from petl.adapters.check.rule import CheckRule, asked
from petl.adapters.export.engines import ENGINES
from petl.errors import InputError, choose
from petl.system.files.paths import is_repository
from petl.system.files.read import iterate_json_lines
from petl.training.watch.findings import Severity

ROWS = 32  # of a file of data
NOTE, WARNING, ERROR = Severity.NOTE, Severity.WARNING, Severity.ERROR


SAVE = "save the adapter again by save_pretrained of the unwrapped model"
FIT = "restore the config of the training, target_modules, modules_to_save, r and rank_pattern"
RESIZE = "base.resize_token_embeddings(len(tokenizer)) before the adapter is loaded, and save both"
TEMPLATES = "tokenizer.save_pretrained(FOLDER) with the template of the training"
FOLD = (
    "petl export RUN OUT --lora writes one rank and scale, which engines read; merge what is no "
    "LoRA, such as new tokens (petl merge), or petl serve"
)
FORMAT = (  # others read what these have found to be right
    CheckRule("format.type", ERROR, contents.unknown_type, SAVE),
    CheckRule("format.values", ERROR, contents.wrong_values, SAVE),
    CheckRule("format.layout", ERROR, contents.foreign, "convert it by the program that wrote it"),
    CheckRule("format.weights", ERROR, contents.unreadable, f"{SAVE}; of a pickle: convert it"),
    CheckRule("format.link", ERROR, contents.links, "put a copy of the file there"),
    CheckRule("format.code", ERROR, contents.code, "set the entry to null"),
)
RULES = (
    CheckRule("keys.prefix", ERROR, contents.prefixes, SAVE),
    CheckRule("keys.literal", ERROR, contents.literals),
    CheckRule("keys.target", ERROR, contents.strangers, FIT),
    CheckRule("keys.absent", WARNING, contents.absent, "check the spelling, or leave it out"),
    CheckRule("keys.head", ERROR, contents.no_head, SAVE),
    CheckRule("keys.pairs", ERROR, contents.unpaired, SAVE),
    CheckRule("keys.ranks", ERROR, contents.ranks, FIT),
    CheckRule("keys.blocks", ERROR, contents.incomplete, SAVE),
    CheckRule(
        "keys.end", ERROR, contents.cut_off, f"{SAVE}, or name its blocks in layers_to_transform"
    ),
    *contents.DEAD,
    CheckRule("scale.alpha", ERROR, contents.no_alpha, "write the value of the training there"),
    CheckRule(
        "scale.config", ERROR, contents.other_scale, "restore it, or delete base_fingerprint.json"
    ),
    CheckRule(
        "format.changed", ERROR, contents.changed, "restore it, or delete base_fingerprint.json"
    ),
    CheckRule("base.fits", ERROR, with_base.misfit, "use the base and the config of the training"),
    CheckRule("base.adapted", ERROR, with_base.other_weights, "use the base of the training"),
    CheckRule("base.others", NOTE, with_base.others_differ),
    CheckRule("base.name", NOTE, with_base.other_name),
    CheckRule("base.head", NOTE, with_base.same_head),
    CheckRule("base.effect", ERROR, with_base.effect, contents.TRAIN),
    CheckRule("base.outputs", ERROR, with_base.unusable, contents.EARLIER),
    CheckRule("base.rows", NOTE, with_base.rows_used),
    CheckRule("merge.loss", ERROR, with_base.rounded_off, "petl merge --dtype float32"),
    CheckRule("merge.kept", NOTE, with_base.merges),
    CheckRule("tied.merge", WARNING, serving.tied, "do not merge it: petl serve"),
    CheckRule("tied.gguf", ERROR, serving.tied_gguf, "petl serve"),
    CheckRule("vocabulary.tokens", ERROR, chat.more_tokens, RESIZE),
    CheckRule("vocabulary.indices", ERROR, chat.tokens_beyond, RESIZE),
    CheckRule("vocabulary.rows", NOTE, chat.new_rows, RESIZE),
    CheckRule("template.missing", WARNING, chat.no_template, TEMPLATES),
    CheckRule(
        "template.base", WARNING, chat.other_template, "serve with --chat-template, or petl serve"
    ),
    CheckRule("template.fails", ERROR, chat.fails, TEMPLATES),
    CheckRule("template.bos", ERROR, chat.two_starts, "remove one of them from the template"),
    CheckRule("template.adds", NOTE, chat.added_start, "encode it with add_special_tokens=False"),
    CheckRule(
        "stop.token", ERROR, chat.no_stop, "make the end of a turn the eos_token, or give --stop"
    ),
    CheckRule("dtype.range", WARNING, contents.near_overflow, "train and save in bfloat16"),
    CheckRule("engine.asked", ERROR, serving.misread, FOLD),
    CheckRule("engine.others", NOTE, serving.engines, FOLD),
    CheckRule(
        "leftovers.files", WARNING, serving.leftovers, "move one of the two to another folder"
    ),
    CheckRule(
        "leftovers.newer", WARNING, serving.newer, "petl check on it: it may be the one meant"
    ),
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
        data: JSON Lines with rows of the training, such as chats; the first 32 are read.

    Raises:
        InputError: there is no adapter, a file that was named is no JSON or has no rows, or the
            base cannot be opened.
    """
    if engine is not None:
        choose(ENGINES, engine, "engine")
    if base is not None and not Path(base).is_dir() and not is_repository(str(base)):
        raise InputError(f"base={str(base)!r} is not the folder of a model, nor a name on the Hub")
    read = iterate_json_lines(Path(data), dict[str, Any]) if data is not None else None
    rows = None if read is None else [*islice(read, ROWS)]
    if rows == []:
        raise InputError(f"{data} has no rows: give a file with one JSON object a line")
    subject = locate(
        str(path),
        base=None if base is None else str(base),
        engine=engine,
        rows=rows,
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
    if base is not None:
        with suppress(NotCheckedError):  # which each rule reports
            with_base.loaded(subject)
    others, reasons = asked(RULES, subject)
    return Checked(
        findings + others,
        str(path),
        subject.described(),
        subject.made_by(),
        not_checked + reasons,
    )
