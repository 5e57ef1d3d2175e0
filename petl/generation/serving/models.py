"""The models that a server offers: a base model, and adapters of any methods on it."""

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import PeftModel

from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core.loading import load
from petl.core.model.copies import share_weights
from petl.core.parameters import max_positions
from petl.core.registry import keeps_base, refusal
from petl.core.spec.facts import modifies_base_weights
from petl.core.support import Capability
from petl.core.types import CausalModel, Processor, Settings
from petl.data.models.loading import load_processor
from petl.data.models.sources import read_source
from petl.data.tasks.base import tokenizer_in
from petl.efficiency.fused_lora.switching import fuse_lora
from petl.errors import InputError
from petl.generation.inference.language_model import BASE, LanguageModel
from petl.generation.inference.loading import (
    Found,
    find_model,
    load_writer,
    model_settings,
    reader_of,
    reading_as_trained,
    refuse_apart,
    task_of,
)
from petl.generation.inference.small_weights import SmallWeights, answer_small, inspect_small
from petl.generation.serving.batch import BatchPasses
from petl.generation.serving.engine import ServedAdapter, Slot
from petl.generation.serving.prefixes import PrefixCache
from petl.ops.small_weights import Kind
from petl.system.files.paths import path_of
from petl.system.progress import ProgressItems

logger = logging.getLogger(__name__)
MAX_NAME = 100  # characters
TEXT = "a text of several tokens"  # which passes behind a cache are checked with


def named_runs(words: list[str]) -> dict[str, str]:
    """Return the paths in words like RUN and NAME=RUN, by name: without one, that of the folder.

    Raises:
        InputError: a name is empty, given twice, too long, or has control characters.
    """
    runs: dict[str, str] = {}
    for word in words:
        name, separator, path = word.partition("=")
        if not separator or Path(word).exists():  # a folder may have = in its name
            folder = path_of("RUN", word).absolute()
            # RUN/adapter is called by the name of its run
            name, path = folder.parent.name if folder.name == "adapter" else folder.name, word
        if not name.strip() or not name.isprintable() or len(name) > MAX_NAME or not path:
            raise InputError(f"{word!r} is neither RUN nor NAME=RUN, with a name for requests")
        if name in runs:
            raise InputError(f"two models would be called {name!r}: give one as NAME={path}")
        runs[name] = path
    return runs


@dataclass(frozen=True)
class SharedBase:
    """What several adapters have in common: their base model, in memory once.

    Attributes:
        name: of the base model, for requests.
        found: what stands at the paths of the command line, by name.
        model: without adapters.
        reader: of the base model: a tokenizer, or processor of images and text.
        readers: of the adapters.
        plain: as of `load_language_model`.
    """

    name: str
    found: Mapping[str, Found]
    model: CausalModel
    reader: Processor
    readers: Mapping[str, Processor]
    plain: bool | None

    @property
    def saved(self) -> dict[str, SavedAdapter]:
        """The adapters."""
        return {n: each for n, each in self.found.items() if isinstance(each, SavedAdapter)}

    @property
    def positions(self) -> int | None:
        """Tokens of prompt and answer at most; None: no limit."""
        return max_positions(self.model)

    def language(self, model: PeftModel | CausalModel) -> LanguageModel:
        """A model that reads prompts as the base model does, without what an adapter has learned.

        Args:
            model: the base model, or one with adapters on it.
        """
        first = next(iter(self.found.values()))
        language = reading_as_trained(model, self.reader, first, {}, plain=bool(self.plain))
        return replace(language, system=None)


def read_base(
    runs: Mapping[str, str],
    *,
    plain: bool | None = None,
    trust_remote_code: bool = False,
    inspect: Callable[[Mapping[str, Found]], None] = lambda found: None,
) -> SharedBase:
    """Load the base model of runs, and what reads their prompts.

    Args:
        runs: folders of runs, of adapters, or of a plain model, by name.
        plain: as of `load_language_model`.
        inspect: raises for what cannot be served, before weights are loaded.

    Raises:
        InputError: there is no such run, the base models differ, or one is no decoder of text.
    """
    found = {
        name: find_model(path, trust_remote_code=trust_remote_code) for name, path in runs.items()
    }
    check_same_base(found)  # before any weights are loaded
    refuse_apart(found)
    inspect(found)
    first_name = next(iter(found))
    first = found[first_name]
    settings = model_settings(first)
    base, reader = load_writer(first, runs[first_name])
    if base.config.is_encoder_decoder:
        raise InputError(
            f"{settings['name']} is an encoder-decoder, and petl serve takes decoders; "
            "`petl generate RUN --file FILE` answers with it"
        )
    saved = {name: each for name, each in found.items() if isinstance(each, SavedAdapter)}
    # a plain model has the name that the command line gives it
    base_name = str(settings["name"]) if saved else first_name
    if base_name in saved:
        raise InputError(f"{base_name!r} is the name of the base model: give the run another name")
    tasks = {name: task_of(each, runs[name]) for name, each in found.items()}
    kinds = {type(task): name for name, task in tasks.items()}
    if len(kinds) > 1:
        raise InputError(
            f"{' and '.join(map(repr, kinds.values()))} were trained on texts and on images: a "
            "server loads one class of model; start another one with --port"
        )
    has_own = read_source(settings).has_tokenizer()
    own = load_processor(settings, tasks[first_name]) if has_own else reader
    readers = {name: reader_of(each, tasks[name], own) for name, each in saved.items()}
    for each in (*readers.values(), own):
        # the first call may change its settings; later ones are made by several threads
        tokenizer_in(each)("")
    return SharedBase(base_name, found, base, own, readers, plain)


def load_served(
    runs: Mapping[str, str],
    *,
    plain: bool | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    drafter: str | None = "free",
    prefix_bytes: int = 0,
    weights: Kind | None = None,
) -> dict[str, ServedAdapter]:
    """Load one base model with all adapters, and return what requests can choose, by name.

    The base model is in memory once, also if the adapters belong to several methods; and once more
    for each adapter whose initialization changes its weights, such as PiSSA.

    Args:
        runs, plain: as of `read_base`.
        other_base: as of `petl.load`.
        drafter: guesses tokens of a request that is decoded alone, as of `petl.drafting.drafter`;
            None: nothing does.
        prefix_bytes: of keys and values of the beginnings of prompts; 0: they are not kept.
        weights: as of `load_language_model`.

    Raises:
        InputError: as of `read_base`.
    """
    small = None if weights is None else SmallWeights(weights)
    shared = read_base(
        runs,
        plain=plain,
        trust_remote_code=trust_remote_code,
        inspect=partial(inspect_small, weights) if weights is not None else lambda found: None,
    )
    prefixes = PrefixCache(prefix_bytes) if prefix_bytes else None
    loader = ModelLoader(shared, drafter, small, prefixes)
    served = loader.adapters(other_base)
    # before the base's own lane, whose drafts look for the layers that they could pack
    if small is not None:
        answer_small(shared.language(shared.model), small.frozen(shared.model), small)
    served = {shared.name: loader.base_model(served), **served}
    # requests of several adapters share a lane
    for each in {id(each.lane): each for each in served.values()}.values():
        assert isinstance(each.lane, Slot)
        ids = each.language.tokenizer(TEXT)["input_ids"]
        each.lane.passes.check(ids, each.adapter)
    return served


def check_same_base(found: Mapping[str, Found]) -> None:
    """Raise InputError unless all adapters have the same base model."""
    bases = {name: base_of(model_settings(each)) for name, each in found.items()}
    first, *others = bases
    for name in others:
        differing = [key for key in bases[name] if bases[name][key] != bases[first][key]]
        if differing:
            one, other = (
                ", ".join(f"{key}={bases[each][key]}" for key in differing)
                for each in (first, name)
            )
            raise InputError(
                f"{first!r} is on a base with {one} and {name!r} on one with {other}: a server has "
                "one base model; start another one with --port"
            )
        # the same base model, but one of the two has no adapter
        if not isinstance(found[name], SavedAdapter) or not isinstance(found[first], SavedAdapter):
            raise InputError(f"{name!r} and {first!r} are not both adapters; serve one of them")


def base_of(settings: Settings) -> dict[str, object]:
    """What identifies a base model: its place, revision and quantization, by name."""
    source = read_source(settings)
    place = source.where()
    # a folder may have several paths, for example by a link
    named = str(place.resolve()) if isinstance(place, Path) else str(place)
    kept = {key: settings.get(key) for key in ("revision", "quantization")}
    return {"model": named, **kept}


@dataclass(frozen=True)
class ModelLoader:
    """Puts adapters on a base model, which several models of different methods share."""

    shared: SharedBase
    drafter: str | None = None
    small: SmallWeights | None = None
    prefixes: PrefixCache | None = None

    def adapters(self, other_base: bool) -> dict[str, ServedAdapter]:
        """Load adapters; those of one method on the same model."""
        saved = self.shared.saved
        # a PEFT model takes adapters of one method only; a base that one of them changes suits no
        # other
        methods: dict[tuple[object, str | None], dict[str, SavedAdapter]] = {}
        for name, each in saved.items():
            own = name if modifies_base_weights(each.config) else None
            methods.setdefault((each.config.peft_type, own), {})[name] = each
        served: dict[str, ServedAdapter] = {}
        for group in methods.values():
            served |= self._of_one_method(group, other_base)
        return {name: served[name] for name in saved}  # in the order of the command line

    def _of_one_method(
        self, group: Mapping[str, SavedAdapter], other_base: bool
    ) -> dict[str, ServedAdapter]:
        changes_base = any(modifies_base_weights(each.config) for each in group.values())
        model: Any = (
            copy.deepcopy(self.shared.model) if changes_base else share_weights(self.shared.model)
        )
        layers = [] if self.small is None else self.small.frozen(model)
        # names of requests may be any; those in a model become parts of the names of tensors
        names = {name: f"served{i}" for i, name in enumerate(group)}
        # of a list: the items of a dict have no length for the bar
        for name, each in ProgressItems([*group.items()], "loading adapters", unit="adapters"):
            model = load(model, each.adapter, adapter_name=names[name], other_base=other_base)
        fuse_lora(model)
        model.eval()
        if self.small is not None:
            self.small.replace_in_decoder(layers, model)
        paths = {name: str(each.run or each.adapter) for name, each in group.items()}
        adapters = {names[name]: path for name, path in paths.items()}
        languages = {
            name: reading_as_trained(
                model, self.shared.readers[name], each, adapters, plain=self.shared.plain
            )
            for name, each in group.items()
        }
        # why the rows of a batch cannot have adapters of their own; "": they can
        reasons = (refusal(c, Capability.MIXED_BATCH) for c in model.peft_config.values())
        reason = next(filter(None, reasons), "")
        if reason and len(group) > 1:
            logger.info("adapters of %s run one after the other: %s", ", ".join(group), reason)
        # None: each row its own
        shared = None if reason else self._lane(next(iter(languages.values())), None)
        return {
            name: ServedAdapter(
                name,
                language,
                names[name],
                shared or self._lane(language, names[name]),
                self.shared.positions,
                paths[name],
            )
            for name, language in languages.items()
        }

    def base_model(self, served: Mapping[str, ServedAdapter]) -> ServedAdapter:
        """The base model without an adapter, in the passes of a method that allows it."""
        lane, model = None, self.shared.model
        for each in served.values():
            host = each.language.model
            assert isinstance(host, PeftModel)
            # a row without an adapter needs the pretrained weights, which some methods change
            own = each.lane
            assert isinstance(own, Slot)
            if own.passes.adapter is None and all(map(keeps_base, host.peft_config.values())):
                lane, model = own, host
                break
        language = self.shared.language(model)
        lane = lane or self._lane(language, BASE)
        return ServedAdapter(self.shared.name, language, BASE, lane, self.shared.positions)

    def _lane(self, language: LanguageModel, adapter: str | None) -> Slot:
        return Slot(BatchPasses(language, adapter, drafter=self.drafter, prefixes=self.prefixes))
