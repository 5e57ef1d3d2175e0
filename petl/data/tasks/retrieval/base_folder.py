"""The folder of an embedding model: what it says of pooling, normalization and prefixes.

The files are those of sentence-transformers, of versions to 5 and from 6 on; both read what is
written.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from petl.data.tasks.base import BaseFiles
from petl.data.tasks.retrieval.dense import DenseLayers
from petl.errors import InputError, shown
from petl.system.values import type_problem

MODULES = "modules.json"
PROMPTS = "config_sentence_transformers.json"
LENGTHS = "sentence_bert_config.json"  # `max_seq_length`, and how a model is called
TOKENIZER = "tokenizer_config.json"
ORDER = ("Transformer", "Pooling", "Dense", "Normalize")  # of the modules that petl computes
# the form of versions to 5, with a boolean for each
FLAGS = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
OF_BASE = " of the base model"
DOCUMENTS = ("document", "passage", "corpus")  # names that the prompt of documents has
NAMES = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
OWN = "sentence_transformers."  # modules of other packages may compute anything
SIMILARITIES = ("cosine", "dot")
OF_RERANKERS = ("sentence_transformers", "sbert_ce_default_activation_function")  # in config.json
ACTIVATIONS = {  # of the scores of a reranker: whether they are probabilities
    "torch.nn.modules.activation.Sigmoid": True,
    "torch.nn.modules.linear.Identity": False,
}


class Module(TypedDict):
    """An entry of `MODULES`."""

    type: str
    path: str


class Prompts(TypedDict, total=False):
    """What is read of `PROMPTS`; other entries are compared alone."""

    prompts: dict[str, str | None] | None


class Lengths(TypedDict, total=False):
    """What is read of `LENGTHS`."""

    max_seq_length: int | None


class BaseFolder:
    """The folder of a base model, read as an embedding model's; it need not be one.

    Attributes:
        is_embedders: whether it has a list of modules.
    """

    def __init__(self, base: BaseFiles) -> None:
        self.base = base
        content = base.json_file(MODULES)
        self.is_embedders = content is not None
        self.modules = [] if content is None else modules_of(content, f"{MODULES}{OF_BASE}")
        self.paths = dict(self.modules)

    def check(self) -> None:
        """Raise InputError if the model does more than to pool and normalize, or decodes."""
        if self.base.has_decoder:
            raise InputError(
                "the base model has an encoder and a decoder: data.task=retrieval needs one of "
                "both alone, such as BERT, ModernBERT or Qwen3"
            )
        names = [name for name, _ in self.modules]
        others = [name for name in names if name not in ORDER]
        is_whole = names.count("Transformer") == names.count("Pooling") == 1
        in_order = not others and names == sorted(names, key=ORDER.index)
        if self.is_embedders and not (in_order and is_whole and names.count("Normalize") < 2):
            raise InputError(
                f"the base model has the modules {', '.join(names) or '[]'}, and petl computes "
                f"{', '.join(ORDER)} in this order, of which there may be several Dense"
            )
        if self.is_embedders and self.paths["Transformer"]:
            raise InputError(
                f"{MODULES}{OF_BASE} has its Transformer in {self.paths['Transformer']}, and petl "
                "reads the one beside that file: save the model with sentence-transformers again"
            )
        if self._lowers(LENGTHS) and not self._lowers(TOKENIZER):
            raise InputError(
                f"{LENGTHS} of the base model has do_lower_case=true, and its tokenizer keeps "
                f"capitals: petl gives the tokenizer texts as they are; set do_lower_case to true "
                f"in {TOKENIZER} of a copy of the folder, or to false in {LENGTHS}"
            )

    def _lowers(self, name: str) -> bool:
        return (self._read(name) or {}).get("do_lower_case") is True

    def _read(self, name: str, shape: object = dict[str, Any]) -> Mapping[str, Any] | None:
        """The content of a file; None without one."""
        content = self.base.json_file(name)
        return None if content is None else shaped(content, shape, f"{name}{OF_BASE}")

    def dense(self) -> DenseLayers | None:
        """The layers behind the pooling; None if there are none."""
        paths = [path for name, path in self.modules if name == "Dense"]
        return DenseLayers(self.base, paths) if paths else None

    def pooling(self) -> str:
        """The pooling of the folder; without one, `last` for decoders and `mean` for encoders.

        Raises:
            InputError: it is another one, or leaves prompts out.
        """
        path = self.paths.get("Pooling", "1_Pooling")
        config = self._read(f"{path}/config.json")
        if config is None:
            return "last" if self.base.is_decoder else "mean"
        if config.get("include_prompt") is False:
            raise InputError(
                f"{path}/config.json of the base model leaves prompts out of the pooling "
                "(include_prompt=false), which petl does not: give data.pooling"
            )
        named = config.get("pooling_mode")
        flags = [name for name, value in config.items() if value is True and name in FLAGS]
        others = [n for n, v in config.items() if v is True and n.startswith("pooling_mode")]
        if named is None and len(flags) == len(others) == 1:
            return FLAGS[flags[0]]
        if isinstance(named, str) and named in NAMES:
            return NAMES[named]
        raise InputError(
            f"{path}/config.json of the base model asks for the pooling "
            f"{named or ' and '.join(others)}: give data.pooling={', '.join(NAMES.values())}"
        )

    def normalizes(self) -> bool:
        """True if the folder has a module that gives vectors unit length."""
        return "Normalize" in self.paths

    @property
    def is_cross_encoder(self) -> bool:
        """True if the folder is that of a reranker; some have a configuration alone."""
        kind = self._config().get("model_type")
        if kind is not None or self.is_embedders:
            return kind == "CrossEncoder"
        config = self._read("config.json") or {}
        if any(name in config for name in OF_RERANKERS):
            return True
        # what sentence-transformers opens as one; no classes and no values are named
        is_scorer = bool(self.scores) and config.get("problem_type") is None
        return is_scorer and len(config.get("id2label") or (0, 1)) == 1

    @property
    def scores(self) -> str:
        """The class of a base model that scores texts or classifies them; "" of another one."""
        kinds = (self._read("config.json") or {}).get("architectures") or [""]
        return kinds[0] if str(kinds[0]).endswith("ForSequenceClassification") else ""

    @property
    def has_probabilities(self) -> bool:
        """True if the scores of a reranker are probabilities.

        Raises:
            InputError: it has another activation, further modules, or a prompt before each pair.
        """
        names = [name for name, _ in self.modules]
        if names not in ([], ["Transformer"]):
            raise InputError(
                f"the reranker has the modules {', '.join(names)}, and petl computes Transformer"
            )
        name, prompts = self._config().get("default_prompt_name"), self._config().get("prompts")
        if name is not None and (prompts or {}).get(name):
            raise InputError(
                f"the reranker puts the prompt {shown(name)} before each pair, which petl does not"
            )
        config = self._read("config.json") or {}
        newer, older = (config.get(name) for name in OF_RERANKERS)
        places = (self._config(), newer if isinstance(newer, Mapping) else {})
        given = [*(place.get("activation_fn") for place in places), older]
        name = next((each for each in given if each is not None), next(iter(ACTIVATIONS)))
        if name not in ACTIVATIONS:
            raise InputError(
                f"the base model's activation_fn is {shown(name)}, and petl computes "
                f"{' and '.join(ACTIVATIONS)}"
            )
        return ACTIVATIONS[name]

    def similarity(self) -> str | None:
        """How vectors are compared, `cosine` or `dot`; None if the folder does not say.

        Raises:
            InputError: in another way.
        """
        name = self._config().get("similarity_fn_name")
        if name is not None and name not in SIMILARITIES:
            raise InputError(
                f"{PROMPTS}{OF_BASE} has similarity_fn_name={shown(name)}, and petl compares "
                f"vectors by {' and '.join(SIMILARITIES)}"
            )
        return name

    @property
    def max_length(self) -> int | None:
        """Tokens of a text at most; None if the folder does not say.

        Raises:
            InputError: it is below 2.
        """
        given = (self._read(LENGTHS, Lengths) or {}).get("max_seq_length")
        if given is not None and given < 2:
            raise InputError(
                f"{LENGTHS}{OF_BASE} has max_seq_length={given}: a text has 2 tokens and more"
            )
        return given

    def _config(self) -> Mapping[str, Any]:
        return self._read(PROMPTS, Prompts) or {}

    def prompts(self) -> tuple[str, str]:
        """The prompts of queries and of documents, "" without one."""
        found = self._config().get("prompts") or {}
        # as encode_document of sentence-transformers looks for it
        names = (name for name in DOCUMENTS if name in found)
        return found.get("query") or "", found.get(next(names, "")) or ""


def modules_of(content: object, place: str) -> list[tuple[str, str]]:
    """The class and the folder of each module in the content of `MODULES`, which `place` names.

    Raises:
        InputError: it is no such list, or a folder is outside.
    """
    modules: list[Module] = shaped(content, list[Module], place)
    paths = [each["path"] for each in modules]
    outside = [p for p in paths if Path(p).is_absolute() or ".." in Path(p).parts]
    if outside:
        raise InputError(f"{place} names {outside[0]}, which leads out of its folder")
    again = [path for i, path in enumerate(paths) if path in paths[:i]]
    if again:
        raise InputError(f"{place} names the folder {shown(again[0])} twice")
    strange = [each["type"] for each in modules if not each["type"].startswith(OWN)]
    if strange:
        raise InputError(
            f"{place} has a module of type {shown(strange[0])}, whose code petl does not have: it "
            f"computes modules of {OWN[:-1]}"
        )
    # such as sentence_transformers.models.Pooling: the last word is the same in all versions
    return [(each["type"].rpartition(".")[2], each["path"]) for each in modules]


def shaped(content: object, shape: object, place: str) -> Any:
    """Return the content of a file; raise InputError if it has another shape."""
    problem = type_problem(content, shape)
    if problem:
        raise InputError(f"{place} cannot be used: {problem}")
    return content


def folder_files(
    pooling: str,
    width: int,
    *,
    dense: Sequence[str] = (),
    normalize: bool,
    prompts: Mapping[str, str],
    similarity: str,
) -> dict[str, object]:
    """The JSON files, by name, that make a folder of a model one that sentence-transformers opens.

    Args:
        width: numbers of a vector behind the pooling.
        dense: paths of the layers behind it.
        similarity: `cosine` or `dot`.
    """
    placed = [("Transformer", ""), ("Pooling", "1_Pooling"), *(("Dense", path) for path in dense)]
    if normalize:
        placed.append(("Normalize", f"{len(placed)}_Normalize"))
    modules = [module(i, *each) for i, each in enumerate(placed)]
    others = dict.fromkeys(("pooling_mode_max_tokens", "pooling_mode_mean_sqrt_len_tokens"), False)
    modes = {flag: name == pooling for flag, name in FLAGS.items()}
    return {
        MODULES: modules,
        "1_Pooling/config.json": {"word_embedding_dimension": width, **modes, **others},
        PROMPTS: {"prompts": dict(prompts), "similarity_fn_name": similarity},
    }


def module(number: int, name: str, path: str) -> dict[str, object]:
    """An entry of `MODULES`."""
    kind = f"sentence_transformers.models.{name}"
    return {"idx": number, "name": str(number), "path": path, "type": kind}
