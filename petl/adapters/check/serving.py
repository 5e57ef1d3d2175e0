"""Rules about what becomes of an adapter: engines, tied weights, files that lie beside it."""

import re
from collections.abc import Iterator

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import CONFIG, WEIGHTS, Subject
from petl.adapters.export.engines import ENGINES, refusal

HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|embed_tokens|wte|embed_in|shared)$")
STATES = re.compile(
    r"(optimizer|scheduler)\.(pt|bin|safetensors)|global_step\d+|scaler\.pt|pytorch_model_fsdp.*"
)
MODELS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
PICKLES = re.compile(r"adapter_model\.(bin|pt)")
LATER = 60.0  # seconds: files of one save are younger or older by less


def adapted_layers(subject: Subject) -> list[str]:
    """Return the names of the layers of a LoRA; none if they cannot be read."""
    try:
        return [*subject.pairs]
    except NotCheckedError:  # the config alone may tell
        return []


def misread(subject: Subject) -> Iterator[Found]:
    """The engine that was asked for refuses it, or would compute another update."""
    if subject.engine is not None:
        engine, adapted = ENGINES[subject.engine], adapted_layers(subject)
        if reason := refusal(subject.config, engine, adapted):
            yield Found(f"{engine} cannot serve it: {reason}", CONFIG)


def engines(subject: Subject) -> Iterator[Found]:
    """Engines that refuse it, or would compute another update."""
    if subject.engine is None and subject.config.get("task_type") in (None, "CAUSAL_LM"):
        adapted = adapted_layers(subject)
        for engine in ENGINES.values():
            if reason := refusal(subject.config, engine, adapted):
                yield Found(f"{engine} cannot serve it: {reason}", CONFIG)


def adapted_ends(subject: Subject) -> str:
    """Return the head and embeddings that an adapter changes on a base that ties them; "": none.

    Raises:
        NotCheckedError: the base's config is not at hand.
    """
    trained = subject.config.get("modules_to_save") or []
    paths = [*trained, *(subject.pairs if subject.kind == "LORA" else ())]
    found = sorted({end[2] for path in paths if (end := HEADS.search(path))})
    return ", ".join(found) if found and subject.of_base.get("tie_word_embeddings") else ""


def tied(subject: Subject) -> Iterator[Found]:
    """One of two weights that the base ties is adapted."""
    if subject.engine != "llama.cpp" and (names := adapted_ends(subject)):
        what = "is adapted, and the base ties head and embedding: a merged model changes both"
        yield Found(f"{names} {what}", CONFIG)


def tied_gguf(subject: Subject) -> Iterator[Found]:
    """The same, for a format that has one tensor for both."""
    if subject.engine == "llama.cpp" and (names := adapted_ends(subject)):
        yield Found(f"{names} is adapted, and a GGUF of a tied base has no tensor for it", CONFIG)


def leftovers(subject: Subject) -> Iterator[Found]:
    """States of optimizers, a complete model, which is loaded in place, and a second adapter."""
    for pattern, what in (
        (STATES, "the training's state lies beside the adapter"),
        (MODELS, "a complete model beside the adapter: who loads the folder has the update twice"),
        (PICKLES, f"a second adapter beside {WEIGHTS}: programs read one or the other"),
    ):
        names = [name for name in subject.files if pattern.fullmatch(name)]
        if names and WEIGHTS in subject.files:
            yield Found(f"{names[0]} ({len(names)} in all): {what}", names[0])


def newer(subject: Subject) -> Iterator[Found]:
    """A checkpoint that was written after the adapter."""
    if not subject.has(WEIGHTS):
        raise NotCheckedError(f"no {WEIGHTS}")
    saved = (subject.folder / WEIGHTS).stat().st_mtime
    for name, path in subject.files.items():
        file = path / WEIGHTS
        if name.startswith("checkpoint-") and subject.has(name) and file.is_file():
            later = file.stat().st_mtime - saved
            if later > LATER:
                yield Found(f"{name} is {later / 60:.0f} minutes newer than the adapter", name)
                return
