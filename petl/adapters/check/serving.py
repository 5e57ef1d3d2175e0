"""Rules about what becomes of an adapter: engines, tied weights, files that lie beside it."""

import re
from collections.abc import Iterator

from petl.adapters.check.findings import Found, NotCheckedError
from petl.adapters.check.folder import CONFIG, WEIGHTS, Subject
from petl.adapters.export.engines import ENGINES, refusal

HEADS = re.compile(r"(^|\.)(lm_head|embed_out|output|embed_tokens|wte|embed_in|shared)$")
OPTIMIZERS = re.compile(
    r"(optimizer|scheduler)\.(pt|bin|safetensors)|global_step\d+|scaler\.pt|pytorch_model_fsdp.*"
)
MODELS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
LATER = 60.0  # seconds: files of one save are younger or older by less
FOLD = "petl export RUN OUT --lora writes one scale and rank that all engines read, where it can"


def misread(subject: Subject) -> Iterator[Found]:
    """The engine that was asked for refuses it, or would compute another update."""
    if subject.engine is None:
        return  # `engines` tells of all
    engine = ENGINES[subject.engine]
    reason = refusal(subject.config, engine)
    if reason:
        yield Found(f"{engine} cannot serve it: {reason}", CONFIG, FOLD)


def engines(subject: Subject) -> Iterator[Found]:
    """Engines that refuse it, or would compute another update."""
    if subject.engine is None and subject.config.get("task_type") in (None, "CAUSAL_LM"):
        for engine in ENGINES.values():
            reason = refusal(subject.config, engine)
            if reason:
                yield Found(f"{engine} cannot serve it: {reason}", CONFIG, FOLD)


# tied


def adapted_ends(subject: Subject) -> list[str]:
    """Return the head and embeddings that an adapter changes.

    Raises:
        NotCheckedError: the base's config is not at hand.
    """
    trained = subject.config.get("modules_to_save") or []
    paths = [*trained, *(subject.pairs if subject.kind == "LORA" else ())]
    found = sorted({end[2] for path in paths if (end := HEADS.search(path))})
    return found if found and subject.of_base.get("tie_word_embeddings") else []


def tied(subject: Subject) -> Iterator[Found]:
    """One of two weights that the base ties is adapted."""
    found = [] if subject.engine == "llama.cpp" else adapted_ends(subject)
    if found:
        yield Found(
            f"{', '.join(found)} is adapted, and the base ties head and embedding: a merged model "
            "changes both",
            CONFIG,
            "keep the adapter unmerged, or set tie_word_embeddings=False in the base",
        )


def tied_gguf(subject: Subject) -> Iterator[Found]:
    """The same, for a format that has one tensor for both."""
    found = adapted_ends(subject) if subject.engine == "llama.cpp" else []
    if found:
        yield Found(
            f"{', '.join(found)} is adapted, and a GGUF of a tied base has no tensor of its own "
            "for it",
            CONFIG,
            "serve it by petl serve",
        )


# leftovers


def leftovers(subject: Subject) -> Iterator[Found]:
    """States of optimizers, and a complete model, which is loaded in place of the adapter."""
    optimizers = [name for name in subject.files if OPTIMIZERS.fullmatch(name)]
    models = [name for name in subject.files if MODELS.fullmatch(name)]
    pickles = [n for n in ("adapter_model.bin", "adapter_model.pt") if n in subject.files]
    if optimizers:
        yield Found(
            f"{len(optimizers)} files of the training's state, such as {optimizers[0]}",
            optimizers[0],
            "give the folder of the adapter alone; petl push leaves them out",
        )
    if models:
        yield Found(
            f"a complete model, {models[0]}, lies beside the adapter: who loads the folder gets "
            "the adapter on top of it",
            models[0],
            "move one of the two to a folder of its own",
        )
    if pickles and WEIGHTS in subject.files:
        yield Found(
            f"two adapters, {WEIGHTS} and {pickles[0]}: programs read one or the other",
            pickles[0],
            f"delete {pickles[0]}",
        )


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
                yield Found(
                    f"{name} is {later / 60:.0f} minutes newer than the adapter",
                    f"{name}/{WEIGHTS}",
                    f"petl check {path}: it may be the one that is meant",
                )
                return
