"""The folder of an adapter as `petl check` reads it: config, header, tokenizer, what the base says.

All of it is data of a stranger: files are bounded, regular, and inside of the folder.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypedDict

from petl.adapters.check.findings import NotCheckedError
from petl.adapters.check.weights import Stored, TensorFile
from petl.errors import InputError
from petl.system.files.disk import check_link
from petl.system.files.paths import is_repository, why_impossible
from petl.system.files.read import parse_json, read_json, read_text, with_shape
from petl.system.patterns import check_patterns

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
COMPRESSED, FINGERPRINT, README = "ternary.safetensors", "base_fingerprint.json", "README.md"
TOKENIZER, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
# read from a repository of the Hub
SHIPPED = [
    *(CONFIG, WEIGHTS, COMPRESSED, FINGERPRINT, README, TOKENIZER, TEMPLATE),
    *("tokenizer.json", "added_tokens.json", "generation_config.json", "labels.json", "task.json"),
]
PREFIX = "base_model.model."  # of every tensor that PEFT saves
LORA = re.compile(r"\.(lora_(?:embedding_)?[AB]|lora_magnitude_vector)(?:\.weight)?$")
BLOCK = re.compile(r"(?:^|\.)(\d+)\.")
# what programs write into the card, the surest first; the group is a version
MAKERS = {
    "petl": re.compile(
        r"(?:[Ss]aved by petl-peft|^- versions: petl) ([\w.]*\w)|library_name: petl|petl-peft", re.M
    ),
    "unsloth": re.compile(r"unsloth(?:[ =:`]+v?(\d[\w.]+))?", re.I),
    "LLaMA-Factory": re.compile(r"llama-?factory", re.I),
    "axolotl": re.compile(r"axolotl(?: version: `([\w.]+)`)?", re.I),
    "TRL": re.compile(r"^- TRL: ([\w.]+)|^- trl$", re.M),
    "mlx": re.compile(r"^- mlx$", re.M),
    "PEFT": re.compile(r"^- PEFT:? ([\w.]+)", re.M),
}
MAX_TOKENIZER = 64 * 2**20  # bytes of tokenizer.json; the largest in use have 40 MB


class BaseConfig(TypedDict, total=False):
    """What is asked of a base model's config.json."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    n_layer: int  # the same in GPT-2, as the next in DistilBERT
    n_layers: int
    num_kv_shared_layers: int
    is_encoder_decoder: bool
    tie_word_embeddings: bool
    eos_token_id: int | list[int]


class WeightIndex(TypedDict):
    """What is asked of a model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str]


@dataclass(frozen=True, eq=False)
class Subject:
    """What is checked, and with what: an adapter's folder, and perhaps a base, an engine, rows.

    Attributes:
        folder: of the adapter.
        name: as the user gave it.
        base: a folder or name; None: files of the base that the config names are read where they
            are on this machine, and no model is loaded.
        engine: a name of `petl.adapters.export.engines.ENGINES`; None: all are asked.
        rows: of the training; None: not given.
        kept: what is loaded once for several rules.
    """

    folder: Path
    name: str
    base: str | None = None
    engine: str | None = None
    rows: list[dict[str, Any]] | None = None
    kept: dict[str, Any] = field(default_factory=dict)

    # The folder

    def has(self, name: str) -> bool:
        """Whether there is such a file, which is no link that leads out of the folder."""
        return name in self.files and name not in self.links

    @cached_property
    def files(self) -> dict[str, Path]:
        """The entries of the folder by name."""
        return {path.name: path for path in sorted(self.folder.iterdir())}

    @cached_property
    def links(self) -> dict[str, str]:
        """By name of an entry, why it is not read: it leads out of the folder, or is no file."""
        found = {}
        for name, path in self.files.items():
            try:
                if path.is_symlink():
                    check_link(path, self.folder)
                if not path.is_file() and not path.is_dir():
                    found[name] = f"{name} is no regular file"
            except InputError as error:
                found[name] = str(error)
        return found

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of adapter_config.json."""
        return self.read(CONFIG)

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the folder; empty if there is none."""
        return read_json(self.folder / name, dict[str, Any]) if self.has(name) else {}

    @cached_property
    def weights(self) -> TensorFile:
        """The tensors.

        Raises:
            NotCheckedError: there are none that can be read.
        """
        if not self.has(WEIGHTS):
            raise NotCheckedError(f"no {WEIGHTS} that can be read")
        try:
            return TensorFile(self.folder / WEIGHTS)
        except InputError as error:
            raise NotCheckedError(f"{WEIGHTS} cannot be read") from error

    @property
    def kind(self) -> str:
        """The PEFT type, without the words for a reader without petl that a file may have."""
        return str(self.config.get("peft_type")).partition(" ")[0]

    @cached_property
    def pairs(self) -> dict[str, dict[str, Stored]]:
        """The tensors of a LoRA by module and by factor: lora_A, lora_B, ...

        Raises:
            NotCheckedError: it is another method's.
        """
        if self.kind != "LORA":
            raise NotCheckedError(f"known for LoRA alone, and this is {self.kind}")
        found: dict[str, dict[str, Stored]] = {}
        for name, stored in self.weights.stored.items():
            end = LORA.search(name)
            if end:
                found.setdefault(name[: end.start()], {})[end[1].replace("embedding_", "")] = stored
        return found

    def is_stacked(self, path: str) -> bool:
        """Return True for a module whose parameters are targets, such as experts in a stack."""
        owners = [n.rpartition(".")[0] for n in self.config.get("target_parameters") or ()]
        # the name of a parameter alone does not say which module owns it
        return any(not each or f".{module_of(path)}".endswith(f".{each}") for each in owners)

    def factor(self, letter: str) -> list[str]:
        """Return the names of the tensors A, or those of B."""
        ends = [(name, LORA.search(name)) for name in self.weights.stored if self.pairs]
        return [name for name, end in ends if end and end[1].endswith(f"_{letter}")]

    @cached_property
    def _pattern_problem(self) -> str:
        """Why a regular expression of the config is not matched: invalid, or it takes too long."""
        try:
            check_patterns(SimpleNamespace(**self.config), map(module_of, self.pairs))
        except InputError as error:
            return str(error)
        return ""

    @property
    def patterns(self) -> dict[str, Any]:
        """The config, once its regular expressions are known to match in time.

        Raises:
            NotCheckedError: one is invalid, or takes too long.
        """
        if self._pattern_problem:
            raise NotCheckedError(self._pattern_problem)
        return self.config

    def by_pattern(self, field: str, path: str, default: object) -> Any:
        """Return the value of rank_pattern or alpha_pattern for a module, as PEFT finds it."""
        given = self.patterns.get(field) or {}
        matching = (key for key in given if re.match(rf"(.*\.)?({key})$", path))
        return given.get(next(matching, path), default)

    def scale_of(self, path: str) -> tuple[int, float]:
        """Return rank and scale of the LoRA of a module."""
        rank = self.by_pattern("rank_pattern", path, self.config.get("r", 8))
        alpha = self.by_pattern("alpha_pattern", path, self.config.get("lora_alpha") or 0)
        return rank, alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    # Tokenizer and base

    def beside(self, name: str) -> Path | None:
        """Return a file of the base model, if it is on this machine."""
        place = self.base or self.config.get("base_model_name_or_path")
        inside = self.folder / "base" / name  # of a base with random weights
        if not self.base and inside.is_file() and not inside.is_symlink():
            return inside
        # a path of another machine's network is not looked up
        if not isinstance(place, str) or place.startswith(("\\\\", "//")) or why_impossible(place):
            return None
        if Path(place).is_dir():
            return Path(place, name) if Path(place, name).is_file() else None
        if not is_repository(place):
            return None
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(place, name)
        return Path(cached) if isinstance(cached, str) else None

    @cached_property
    def of_base(self) -> BaseConfig:
        """The config of the base model, that of its text part if it has several.

        Raises:
            NotCheckedError: it is not on this machine.
        """
        file = self.beside("config.json")
        if file is None:
            place = self.base or self.config.get("base_model_name_or_path")
            raise NotCheckedError(f"the base {place} is not on this machine: give --base")
        content = read_json(file, dict[str, Any])
        inner = content.get("text_config")
        merged = {**content, **(inner if isinstance(inner, dict) else {})}
        merged.setdefault("tie_word_embeddings", content.get("tie_word_embeddings"))
        known = {key: merged[key] for key in BaseConfig.__annotations__ if merged.get(key)}
        try:
            return with_shape(known, BaseConfig)
        except ValueError as error:
            raise NotCheckedError(f"{file} cannot be used: {error}") from error

    @property
    def blocks_of_base(self) -> int:
        """The number of blocks of the base, of which all are alike.

        Raises:
            NotCheckedError: it is not known.
        """
        way = f"petl check {self.name} --base FOLDER compares them"
        try:
            config = self.of_base
        except NotCheckedError as reason:
            raise NotCheckedError(f"how many blocks there are: {reason}; {way}") from reason
        counts = [config.get("num_hidden_layers"), config.get("n_layer"), config.get("n_layers")]
        count = next(filter(None, counts), None)
        if count is None or config.get("is_encoder_decoder") or config.get("num_kv_shared_layers"):
            raise NotCheckedError(f"how many blocks have the targets: its config differs; {way}")
        return count

    @cached_property
    def base_folder(self) -> Path | None:
        """The folder of the base's config, if it is on this machine and not the adapter's own."""
        file = self.beside("config.json")
        if file is None or file.parent.resolve().is_relative_to(self.folder.resolve()):
            return None
        return file.parent

    @cached_property
    def base_tensors(self) -> dict[str, Stored]:
        """The tensors of the base by name, as its files have them; {}: these are not at hand."""
        index = self.beside("model.safetensors.index.json")
        content = (
            read_json(index, WeightIndex) if index else {"weight_map": {"": "model.safetensors"}}
        )
        found: dict[str, Stored] = {}
        for name in {*content["weight_map"].values()}:
            file = self.beside(name) if Path(name).name == name else None
            if file is None:
                return {}
            found |= TensorFile(file).stored
        return found

    def generation(self) -> dict[str, Any] | None:
        """Return the generation config: the adapter's, or else the base's; None: neither."""
        if self.has("generation_config.json"):
            return self.read("generation_config.json")
        file = self.beside("generation_config.json")
        return read_json(file, dict[str, Any]) if file else None

    @cached_property
    def tokenizer(self) -> dict[str, Any]:
        """The content of tokenizer_config.json.

        Raises:
            NotCheckedError: the folder has no tokenizer.
        """
        if not self.has(TOKENIZER):
            raise NotCheckedError(f"{self.name} has no tokenizer")
        return read_tokenizer(self.folder / TOKENIZER)

    @cached_property
    def added(self) -> dict[int, str]:
        """The tokens beside the vocabulary, special ones mostly, by id."""
        found: dict[int, object] = {}
        if self.has("tokenizer.json"):
            text = read_text(self.folder / "tokenizer.json", MAX_TOKENIZER)
            start = text.find('"added_tokens"')
            start = text.find("[", start) if start >= 0 else -1
            if start >= 0:  # the vocabulary behind it takes a second to parse
                try:
                    entries, _ = json.JSONDecoder().raw_decode(text, start)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise NotCheckedError("tokenizer.json is no JSON") from error
                for entry in entries:
                    if isinstance(entry, dict) and isinstance(entry.get("id"), int):
                        found[entry["id"]] = entry.get("content")
        decoder = self.tokenizer.get("added_tokens_decoder")
        for number, entry in (decoder if isinstance(decoder, dict) else {}).items():
            if number.isdecimal() and len(number) < 10 and isinstance(entry, dict):
                found[int(number)] = entry.get("content")
        for token, number in self.read("added_tokens.json").items():
            found[number if isinstance(number, int) else -1] = token
        return {n: t for n, t in found.items() if n >= 0 and isinstance(t, str)}

    def special(self, name: str) -> str:
        """Return the special token of a name, such as eos_token; "": there is none."""
        token = self.tokenizer.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        return token if isinstance(token, str) else ""

    @cached_property
    def template(self) -> str:
        """The chat template of the folder; "": it has none."""
        if self.has(TEMPLATE):
            return read_text(self.folder / TEMPLATE)
        return template_in(self.tokenizer)

    # What it is

    def described(self) -> str:
        """Return what the folder holds: "LoRA r 8, 7 blocks of 7"."""
        if self.kind != "LORA":
            return self.kind.removeprefix("PETL_").lower() if "PETL_" in self.kind else self.kind
        names = [("use_dora", "DoRA"), ("use_rslora", "rsLoRA")]
        name = next((name for field, name in names if self.config.get(field)), "LoRA")
        try:
            pairs = {path: each for path, each in self.pairs.items() if not self.is_stacked(path)}
            factors = [each["lora_A"] for each in pairs.values() if "lora_A" in each]
            blocks = {found[1] for path in self.pairs if (found := BLOCK.search(path))}
        except NotCheckedError:
            return name
        ranks = {factor.shape[0] for factor in factors if factor.shape} or {self.config["r"]}
        span = f"{min(ranks)}" if len(ranks) == 1 else f"{min(ranks)} to {max(ranks)}"
        try:
            of_all = f" of {self.blocks_of_base}"
        except NotCheckedError:
            of_all = ""
        return f"{name} r {span}, {len(blocks)} blocks{of_all}"

    def made_by(self) -> str:
        """Return which program wrote the folder, and where it says so; "": unknown."""
        if "unsloth" in json.dumps(self.config.get("auto_mapping") or {}):
            return f"unsloth ({CONFIG})"
        card = read_text(self.folder / README) if self.has(README) else ""
        if self.has(FINGERPRINT) and not MAKERS["petl"].search(card):
            return f"petl ({FINGERPRINT})"
        for name, mark in MAKERS.items():
            if found := mark.search(card):
                version = found[1] if found.re.groups else None
                return f"{name} {version} ({README})" if version else f"{name} ({README})"
        version = self.config.get("peft_version")
        return f"PEFT {version} ({CONFIG})" if isinstance(version, str) else ""


def read_tokenizer(file: Path) -> dict[str, Any]:
    """Return the content of a tokenizer_config.json.

    "No limit" stands there as an integer of 100 bits, which is not read.
    """
    text = re.sub(r'"model_max_length":\s*\d+', '"model_max_length": 0', read_text(file))
    try:
        return with_shape(parse_json(text), dict[str, Any])
    except ValueError as error:
        raise InputError(f"{file} cannot be used: {error}") from error


def template_in(tokenizer: Mapping[str, object]) -> str:
    """Return the chat template in a tokenizer_config.json; of several the default, "": none."""
    given = tokenizer.get("chat_template")
    if isinstance(given, list):
        named = {e.get("name"): e.get("template") for e in given if isinstance(e, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else ""


def module_of(name: str) -> str:
    """Return the path in the base model of a module by its name in an adapter's file."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def locate(path: str, **given: Any) -> Subject:
    """Find the adapter in a folder, in that of a run, or in a repository of the Hub.

    Raises:
        InputError: there is none.
    """
    folder = Path(path).expanduser()
    if why_impossible(path) or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{path!r} is not the folder of an adapter, nor a name on the Hub")
    if folder.is_dir():
        inside = folder / "adapter"  # of a run
        folder = inside if inside.is_dir() and not (folder / CONFIG).is_file() else folder
        return Subject(folder, path, **given)
    from huggingface_hub import snapshot_download

    from petl.system.files import hub

    where = hub.arguments_of(path, CONFIG, {})
    with hub.answered("model", path):
        return Subject(
            Path(snapshot_download(path, allow_patterns=SHIPPED, **where)), path, **given
        )
