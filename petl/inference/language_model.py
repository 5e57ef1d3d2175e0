"""A language model with saved adapters, one of which writes at a time."""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteriaList

from petl.core.loading import load
from petl.core.switching.lora import fuse_lora
from petl.data.files import file_names, located_rows
from petl.data.validation import every
from petl.errors import InputError, UnknownNameError, did_you_mean, first_line
from petl.export.saved_adapter import Saved, device, find, model_in
from petl.files.safe_open import check_links
from petl.inference.sampling import Sampling, StopEvent, StopTexts, TextStream, before_stop
from petl.models.loading import load_base, load_tokenizer, loading, max_positions
from petl.models.sources import read_source
from petl.tasks.base import Task, pad_id
from petl.tasks.causal_lm import CausalLM
from petl.tasks.chat import encode_chat, question
from petl.tasks.rows import IGNORED, Message
from petl.tasks.seq2seq import Seq2Seq
from petl.training.generation import as_list, padded

logger = logging.getLogger(__name__)
BASE = "base"  # the name of the model without an adapter
DEFAULT = "default"  # the name of the first adapter
WRITERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # ends of names of classes
NO_COLUMNS = ("pack", "generate")  # settings of training only, which do not suit all prompts
Prompt = str | list[Message]


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: without end token and stop text.
        tokens: number of generated tokens, the end token included.
        finish: "stop" at an end token or stop text, "length" at the limit, "interrupted".
    """

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class LanguageModel:
    """A language model, its tokenizer, and its adapters.

    Attributes:
        adapters: folder of each adapter by its name; the first writes by default.
        is_chat: True if prompts are turns of the chat template, False if they are plain text.
        system: the system prompt of chats that have none, as in training.
        prefix: put before each text of an encoder-decoder, as in training.
        columns: the settings under `data` of the run that name the columns of rows.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    is_chat: bool
    adapters: Mapping[str, str] = field(default_factory=dict)
    system: str | None = None
    prefix: str = ""
    columns: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> PreTrainedModel:
        """The base model, adapters included."""
        model: Any = self.model
        return model.get_base_model() if isinstance(model, PeftModel) else model

    @property
    def is_encoder_decoder(self) -> bool:
        """True if prompts are read by an encoder."""
        return bool(self.base.config.is_encoder_decoder)

    @property
    def names(self) -> list[str]:
        """The names for `using`: the adapters, the default first, and the base model."""
        return [*self.adapters, BASE]

    @cached_property
    def ends(self) -> list[int]:
        """The tokens at which an answer ends."""
        # chat models end a turn by a token of their generation config, not by the tokenizer's
        of_config = as_list(self.base.generation_config.eos_token_id)
        ends = {self.tokenizer.eos_token_id, *of_config}
        # a base model that was trained on a chat template knows the template's token only
        ends |= {end_of_turn(self.tokenizer)} if self.is_chat else set()
        return sorted(ends - {None})

    @contextmanager
    def using(self, name: str) -> Generator[None]:
        """Activate an adapter, or for `BASE` none, inside the block.

        Raises:
            UnknownNameError: there is no such adapter.
        """
        if name not in self.names:
            raise UnknownNameError(f"no adapter {name!r}{did_you_mean(name, self.names)}")
        if not isinstance(self.model, PeftModel):
            yield
        elif name == BASE:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(name, inference_mode=True)
            yield

    # Prompts

    def encode(self, prompt: Prompt, system: str | None = None) -> list[int]:
        """The token ids of a prompt: a text, or the messages of a conversation.

        Args:
            system: the system prompt of a conversation without one; None: `self.system`.

        Raises:
            InputError: the chat template refuses the conversation; or the model reads plain text,
                and this is more than one turn, or has a system prompt.
        """
        system = self.system if system is None else system
        if self.is_chat:
            turns = [message("user", prompt)] if isinstance(prompt, str) else prompt
            if system and all(turn["role"] != "system" for turn in turns):
                turns = [message("system", system), *turns]
            return question(self.tokenizer, turns)
        if system or (not isinstance(prompt, str) and len(prompt) > 1):
            raise InputError(
                f"{self.name} reads plain text, without system prompts and earlier turns; they "
                "need a chat template"
            )
        text = prompt if isinstance(prompt, str) else prompt[0]["content"]
        ids = list(self.tokenizer(f"{self.prefix}{text}", verbose=False)["input_ids"])
        # some tokenizers end each text, after which a decoder would write another one
        end = self.tokenizer.eos_token_id
        return ids[:-1] if not self.is_encoder_decoder and ids[-1:] == [end] else ids

    # Answers

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        write: Callable[[str], object] | None = None,
        stop: Event | None = None,
    ) -> list[Answer]:
        """Answer encoded prompts in one batch, with the adapter of `using`.

        Args:
            write: gets the text of the answer to a single prompt in pieces.
            stop: set it, in another thread or a signal handler, to end the answers early.

        Raises:
            InputError: a prompt is empty or longer than the model allows, or the model or number of
                prompts does not allow prompt lookup.
        """
        longest = max(map(len, prompts))
        inputs = padded(prompts, pad_id(self.tokenizer), on_left=not self.is_encoder_decoder)
        arguments = sampling.arguments(self.base.generation_config)
        room = self._room(prompts)
        if room is not None:
            arguments["max_new_tokens"] = min(arguments["max_new_tokens"], room)
        start = 1 if self.is_encoder_decoder else longest  # of the answer, in what is generated
        criteria: list[Any] = [] if stop is None else [StopEvent(stop)]
        if sampling.stop:
            criteria.append(StopTexts(self.tokenizer, sampling.stop, start))
        if write is not None:
            arguments["streamer"] = TextStream(self.tokenizer, write, sampling.stop)
        writer: Any = self.model  # of transformers or PEFT, whose types differ
        try:
            generated = writer.generate(
                **{name: tensor.to(self.base.device) for name, tensor in inputs.items()},
                **arguments,
                eos_token_id=self.ends,
                pad_token_id=pad_id(self.tokenizer),
                stopping_criteria=StoppingCriteriaList(criteria),
            )
        except ValueError as error:
            if sampling.prompt_lookup is None:
                raise
            raise InputError(f"prompt lookup is not possible: {first_line(error)}") from error
        rows = generated[:, start:].tolist()
        is_interrupted = stop is not None and stop.is_set()
        return [self._answer_of(row, sampling.stop, is_interrupted) for row in rows]

    def _answer_of(self, ids: list[int], stop: Sequence[str], is_interrupted: bool) -> Answer:
        """The answer in generated tokens, which may have padding after its end token."""
        ended = next((i for i, token in enumerate(ids) if token in self.ends), None)
        text = str(self.tokenizer.decode(ids[:ended], skip_special_tokens=True))
        cut = before_stop(text, stop)
        tokens = len(ids) if ended is None else ended + 1
        if ended is None and cut is None:
            return Answer(text, tokens, "interrupted" if is_interrupted else "length")
        return Answer(text if cut is None else cut, tokens, "stop")

    def _room(self, prompts: Sequence[Sequence[int]]) -> int | None:
        """The number of tokens that fit behind the longest prompt; None without a limit."""
        if not all(prompts):
            raise InputError("a prompt is empty: it has no tokens")
        limit, longest = max_positions(self.base), max(map(len, prompts))
        if limit is None:
            return None
        room = limit if self.is_encoder_decoder else limit - longest
        if room < 1 or longest > limit:
            raise InputError(
                f"a prompt has {longest:,} tokens, and {self.name} has {limit:,} positions, for "
                "prompt and answer together: shorten it"
            )
        return room


def message(role: str, content: str) -> Message:
    """One turn of a conversation."""
    return {"role": role, "content": content}


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token by which the chat template ends an answer; None if it has none."""
    try:
        ids, labels = encode_chat(tokenizer, [message("user", "a"), message("assistant", "b")])
    except InputError:  # it takes other conversations only, such as those with a system prompt
        return None
    learned = [token for token, label in zip(ids, labels, strict=True) if label != IGNORED]
    return learned[-1] if learned and learned[-1] in tokenizer.all_special_ids else None


# Loading


def load_language_model(
    run: str | Path,
    others: Mapping[str, str] | None = None,
    *,
    plain: bool | None = None,
    trust_remote_code: bool = False,
    other_base: str = "warn",
) -> LanguageModel:
    """Load a saved adapter with its base model, or a plain model, and further adapters.

    Args:
        run: folder of a run, of an adapter, or of a model, such as a merged one.
        others: folders of runs or adapters, by name.
        plain: read prompts as plain text, without the chat template; None: if there is no template,
            or the run has learned from plain texts.
        other_base: as of `petl.load`.

    Raises:
        InputError: there is no such model, it does not write text, an adapter does not fit.
    """
    found = find_model(run, trust_remote_code=trust_remote_code)
    first = {DEFAULT: found} if isinstance(found, Saved) else {}
    more = {
        name: find(path, trust_remote_code=trust_remote_code)
        for name, path in (others or {}).items()
    }
    taken = [name for name in more if name in (*first, BASE)]
    if taken:
        raise InputError(f"the adapter name {taken[0]!r} is taken; choose another one")
    model, tokenizer = load_writer(found, run)
    for name, saved in (first | more).items():
        model = load(model, saved.adapter, adapter_name=name, other_base=other_base)
    fuse_lora(model)  # as in training, and a switch takes the same time with many adapters
    names = {**({DEFAULT: str(run)} if first else {}), **(others or {})}
    return reading_as_trained(model.eval(), tokenizer, found, names, plain=plain)


def load_writer(
    found: Saved | Mapping[str, Any], path: str | Path
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Load the base model of `find_model(path)`, on the accelerator if there is one, and tokenizer.

    Raises:
        InputError: it does not write text, or cannot be loaded.
    """
    settings = model_settings(found)
    logger.info("loading %s", settings["name"])
    task, tokenizer = task_of(found, path), load_tokenizer(settings)
    model: Any = load_base(settings, task, processor=tokenizer)
    if settings.get("quantization") is None:  # a quantized model was placed while it was loaded
        model = model.to(device())
    return model, tokenizer


def model_settings(found: Saved | Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings under `model` of what `find_model` returns."""
    return found.settings["model"] if isinstance(found, Saved) else found


def reading_as_trained(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    found: Saved | Mapping[str, Any],
    adapters: Mapping[str, str],
    *,
    plain: bool | None = None,
) -> LanguageModel:
    """A loaded model that reads prompts as the run of `found` has learned them.

    Args:
        adapters: as of `LanguageModel`.
        plain: as of `load_language_model`.

    Raises:
        InputError: `plain` is False, and there is no chat template.
    """
    name, config = str(model_settings(found)["name"]), getattr(model, "config", None)
    data = found.settings.get("data", {}) if isinstance(found, Saved) else {}
    is_plain = learned_plain_text(data) if plain is None else plain
    is_decoder = not getattr(config, "is_encoder_decoder", False)
    is_chat = bool(tokenizer.chat_template) and not is_plain and is_decoder
    if plain is False and not is_chat:
        raise InputError(f"{name} has no chat template: leave --no-plain out")
    system = data.get("system") if is_chat else None
    return LanguageModel(
        model,
        tokenizer,
        name,
        is_chat,
        adapters=adapters,
        system=system if system and "{" not in system else None,  # of a template, rows have parts
        prefix=data.get("prefix") or "",
        columns={key: value for key, value in data.items() if key not in NO_COLUMNS},
    )


def find_model(path: str | Path, *, trust_remote_code: bool = False) -> Saved | dict[str, Any]:
    """Find the adapter at `path`, or return the settings of the plain model there.

    Raises:
        InputError: there is neither.
    """
    folder = Path(path)
    has_model = (folder / "config.json").is_file()
    if not has_model or (folder / "adapter").is_dir() or (folder / "adapter_config.json").is_file():
        return find(path, trust_remote_code=trust_remote_code)
    check_links(folder)
    return {**model_in(folder), "trust_remote_code": trust_remote_code}


def task_of(found: Saved | Mapping[str, Any], path: str | Path) -> Task:
    """The task of a model that writes.

    Raises:
        InputError: the model does not write.
    """
    if isinstance(found, Saved):
        kind = str(found.config.task_type)
        reads = {"CAUSAL_LM": False, "SEQ_2_SEQ_LM": True}.get(kind)
    else:
        source = read_source(found)
        with loading(source):
            config = source.config()
        kind = ", ".join(config.architectures or ["no class of model"])
        writes = not config.architectures or kind.endswith(WRITERS)
        reads = bool(config.is_encoder_decoder) if writes else None
    if reads is None:
        raise InputError(
            f"{path} does not write text ({kind}): give a model of data.task=causal_lm or seq2seq; "
            "`petl predict` labels examples"
        )
    # lengths are those of the prompts
    return Seq2Seq(max_length=1, max_target_length=1) if reads else CausalLM(max_length=1)


def learned_plain_text(data: Mapping[str, Any]) -> bool:
    """True if a run with these settings under `data` has learned from plain texts."""
    if data.get("source") == "hamlet" or data.get("pack") or data.get("format") == "text":
        return True
    if any(data.get(name) for name in ("format", "messages", "prompt")):
        return False
    if data.get("source") != "files" or data.get("text", "text") != "text":
        return data.get("text", "text") != "text"
    try:  # the format was recognized from the columns, of which that of texts comes first
        _, row = next(located_rows("data.train", file_names("data.train", data["train"]), every))
    except InputError:  # the file is gone; prompts of a chat model are usually turns
        return False
    return "text" in row
