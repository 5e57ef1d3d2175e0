"""An engine that answers with llama.cpp, in the wheels of xllamacpp: plain models and LoRAs.

Its server object has a socket of its own that cannot be turned off: it gets one in a folder that
only this user may enter, and all requests go through petl's gate.
"""

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, PretrainedConfig, RepetitionPenaltyLogitsProcessor
from transformers.generation import (
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from petl.adapters.export.engines import COMMON, features
from petl.adapters.export.gguf import DECODERS, FILE, Decoder, export_gguf, row_order
from petl.adapters.export.saved_adapter import SavedAdapter
from petl.core.parameters import max_positions
from petl.core.refusals import is_lora
from petl.core.registry import require_capability
from petl.core.support import Capability
from petl.core.types import CausalModel
from petl.data.models.loading import loading
from petl.data.models.sources import read_source
from petl.errors import InputError, RunStopped, UnsupportedError
from petl.generation.inference.grammar import GrammarMask
from petl.generation.inference.language_model import BASE
from petl.generation.inference.loading import Found, model_settings, reading_as_trained
from petl.generation.serving.choice import Chooser, LogProb, OccurrencePenalty
from petl.generation.serving.engine import AnswerEngine, ServedAdapter
from petl.generation.serving.gguf_model import (
    EXTRA,
    next_token,
    tokens_in,
    write_model,
)
from petl.generation.serving.models import read_base
from petl.generation.serving.request import Request
from petl.system.imports.extras import need_extra, optional

NAME = "llama.cpp"
MODEL = "model.gguf"
PLAIN = "default"  # positions without scaling
CONTEXTS = 2  # of the longest requests that fit into memory together; assumption
POSITIONS = 8192  # of a prompt with its answer at most; assumption
# of the log probability of a token, by the type of the weights; assumptions
TOLERANCES = {"float32": 0.01, "float16": 0.1, "q8_0": 0.5, "int8": 0.5, "int4": 2.0}
logger = logging.getLogger(__name__)

Fields = dict[str, object]
# what a processor of transformers is in a request to llama.cpp
RANDOM = 2**32 - 1  # a seed for which llama.cpp draws other numbers each time
FIELDS: dict[type[LogitsProcessor], Callable[[Any], Fields]] = {
    TemperatureLogitsWarper: lambda each: {"temperature": each.temperature},
    TopKLogitsWarper: lambda each: {"top_k": each.top_k},
    TopPLogitsWarper: lambda each: {"top_p": each.top_p},
    RepetitionPenaltyLogitsProcessor: lambda each: {"repeat_penalty": each.penalty},
    SequenceBiasLogitsProcessor: lambda each: {
        "logit_bias": [[ids[0], bias] for ids, bias in each.sequence_bias.items()]
    },
}
LACKS: dict[type[LogitsProcessor], str] = {
    GrammarMask: "answers that follow a schema (response_format, required tools)",
    OccurrencePenalty: "presence_penalty and frequency_penalty, which would count the prompt too",
}


def sampling_fields(chooser: Chooser) -> Fields:
    """The choice of tokens of a request, in the fields of llama.cpp.

    Raises:
        InputError: llama.cpp has no field for a part of it.
    """
    fields: Fields = {
        "temperature": 1.0 if chooser.samples else 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repeat_penalty": 1.0,
        "repeat_last_n": POSITIONS,  # prompt and answer, as transformers has it
        # the order of transformers
        "samplers": ["penalties", "temperature", "top_k", "top_p"],
        "seed": -1 if chooser.seed is None else chooser.seed % RANDOM,
        # 0 would report nothing at all
        "n_probs": 0 if chooser.top_logprobs is None else max(chooser.top_logprobs, 1),
    }
    for each in chooser.processors:
        kind = type(each)
        if kind not in FIELDS:
            what = LACKS.get(kind, f"{kind.__name__} of the model's generation config")
            raise InputError(f"--engine {NAME} has not {what}: --engine petl has")
        fields |= FIELDS[kind](each)
    return fields


@dataclass(eq=False)
class LlamaLane:
    """Requests of one LoRA, or of the model without one.

    Attributes:
        lora: its number; None: no LoRA.
        count: of all LoRAs.
    """

    lora: int | None
    count: int

    def admit(self, chooser: Chooser) -> None:
        """Raise InputError if llama.cpp cannot choose tokens in this way."""
        sampling_fields(chooser)

    @property
    def scales(self) -> list[Fields]:
        """The scale of each LoRA in a request."""
        return [{"id": i, "scale": float(i == self.lora)} for i in range(self.count)]


class LlamaEngine(AnswerEngine):
    """Answers requests with llama.cpp, each in a thread that waits for its tokens.

    Attributes:
        cells: tokens whose keys and values fit into memory: a request waits until its prompt and
            the longest answer to it do.
    """

    def __init__(self, server: Any, cells: int, *, max_batch: int, max_waiting: int) -> None:
        super().__init__(max_batch=max_batch, max_waiting=max_waiting)
        self.server, self.cells = server, cells
        self._answers: dict[Request, Thread] = {}

    @property
    def running(self) -> int:
        """The number of answers in progress."""
        return len(self._answers)

    def _fits(self) -> bool:
        """True if the request that waits longest can begin."""
        if not self._waiting or len(self._answers) >= self.max_batch:
            return False
        asked = [*self._answers, self._waiting[0][1]]
        return sum(len(each.prompt) + each.max_tokens for each in asked) <= self.cells

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._fits())
                if self._closed:
                    break
                lane, request = self._waiting.popleft()
                if request.cancelled.is_set():
                    continue
                thread = Thread(target=self._answer, args=(lane, request), daemon=True)
                self._answers[request] = thread
            thread.start()
        for thread in list(self._answers.values()):
            thread.join()
        self._end_waiting()

    def _answer(self, lane: LlamaLane, request: Request) -> None:
        body = {
            **sampling_fields(request.chooser),
            "prompt": list(request.prompt),
            "n_predict": request.max_tokens,
            "stream": True,
            "lora": lane.scales,
        }
        ended = False

        def take(chunk: Mapping[str, object]) -> bool:
            """Hand over the tokens of a chunk; True ends the answer."""
            nonlocal ended
            try:  # xllamacpp would lose what is raised here
                if self._closed and not ended:
                    raise RunStopped("the server is stopping")
                ended = ended or not hand_over(chunk, request)
            except Exception as error:
                request.emit(error)
                ended = True
            return ended

        try:
            found = self.server.handle_completions(body, take)
            if not ended:
                said = (found or {}).get("error", {}).get("message", "no end of the answer")
                request.emit(RuntimeError(f"{NAME}: {said}"))
        except Exception as error:  # the fault of one request, which the others do not share
            logger.exception("a request failed")
            request.emit(error)
        finally:
            with self._changed:
                self._answers.pop(request, None)
                self._changed.notify()


def hand_over(chunk: Mapping[str, Any], request: Request) -> bool:
    """Hand the tokens of a chunk to its request; return True if the answer goes on.

    Raises:
        RuntimeError: the chunk is an error.
    """
    if "error" in chunk:
        raise RuntimeError(f"{NAME}: {chunk['error'].get('message')}")
    for choice in chunk["choices"]:
        entries = (choice.get("logprobs") or {}).get("content") or []
        tokens = tokens_in(choice["text"])
        for place, token in enumerate(tokens):
            logprobs = _logprobs(entries[place], request) if place < len(entries) else []
            if not request.take(token, logprobs):
                return False
        # an end token has no text
        if choice.get("finish_reason") == "stop" and not request.take(request.ends[0], []):
            return False
    return True


def _logprobs(entry: Mapping[str, Any], request: Request) -> list[LogProb]:
    """What `Chooser.choose` reports with a token."""
    wanted = request.chooser.top_logprobs
    if wanted is None:
        return []
    likely = [LogProb(each["id"], each["logprob"]) for each in entry["top_logprobs"][:wanted]]
    return [LogProb(entry["id"], entry["logprob"]), *likely]


# Loading


def decoder_of(config: Any) -> Decoder:
    """Return the architecture in llama.cpp of a model with this config.

    Raises:
        UnsupportedError: it is none of `DECODERS`, or has a part that the file does not hold.
    """
    kind = config.model_type
    if kind not in DECODERS:
        raise UnsupportedError(
            f"a model of the type {kind} is not written for llama.cpp; possible: "
            f"{', '.join(DECODERS)}; --engine petl serves any decoder"
        )
    ropes = [config.rope_parameters, *config.rope_parameters.values()]
    scaled = {each["rope_type"] for each in ropes if isinstance(each, dict) and "rope_type" in each}
    windows = not kind.startswith("gemma") and "sliding_attention" in _layer_types(config)
    if scaled - {PLAIN} or windows:
        what = f"positions of the type {max(scaled)}" if scaled - {PLAIN} else "a window"
        raise UnsupportedError(
            f"a {kind} with {what} is not written for llama.cpp: take --engine petl"
        )
    return DECODERS[kind]


def _layer_types(config: PretrainedConfig) -> list[str]:
    values = config.to_dict()
    # Mistral has one window for all layers
    window = ["sliding_attention"] if values.get("sliding_window") else []
    return values.get("layer_types") or window


def inspect_llama(found: Mapping[str, Found]) -> None:
    """Raise UnsupportedError, before weights are loaded, for what llama.cpp cannot serve.

    Raises:
        InputError: a package is missing.
    """
    for package in ("xllamacpp", "gguf"):
        need_extra(EXTRA, package, f"--engine {NAME}")
    for name, each in found.items():
        settings = model_settings(each)
        if settings.get("quantization") is not None:
            raise UnsupportedError(
                f"{name} has a base in {settings['quantization']}, and llama.cpp gets float32 or "
                "float16: take --engine petl"
            )
        with loading(source := read_source(settings)):
            decoder_of(source.config())
        if isinstance(each, SavedAdapter):
            require_capability(each.config, Capability.LORA_EXPORT, f"--engine {NAME}")
            config = {**each.config.to_dict(), "peft_type": "LORA"}
            lacking = [COMMON[word] for word in features(config) if word in COMMON]
            # other methods become a LoRA, which has none of it
            if is_lora(each.config) and lacking:
                raise UnsupportedError(
                    f"--engine {NAME} cannot serve {name}: {lacking[0]}; take --engine petl, or "
                    "petl merge"
                )


def load_llama(  # noqa: PLR0913 - all but two by name
    runs: Mapping[str, str],
    folder: Path,
    *,
    plain: bool | None = None,
    trust_remote_code: bool = False,
    other_base: bool = False,
    weights: str | None = None,
    max_batch: int,
    max_waiting: int,
) -> tuple[dict[str, ServedAdapter], LlamaEngine]:
    """Write a base model and its adapters for llama.cpp; return what serves them.

    The weights are not kept in torch.

    Args:
        runs, plain: as of `read_base`.
        other_base: as of `petl.load`.
        weights: a name of `TYPES`; None: float32, or float16 if the weights have 16 bits.
        folder: an empty one that is kept while the engine runs, which others may not enter.
        max_batch, max_waiting: as of `AnswerEngine`.

    Raises:
        InputError: as of `read_base`; a package is missing, or llama.cpp cannot serve one of them.
    """
    shared = read_base(
        runs, plain=plain, trust_remote_code=trust_remote_code, inspect=inspect_llama
    )
    base, saved = shared.model, shared.saved
    language = shared.language(base)
    if not language.ends:
        raise UnsupportedError(f"{language.name} has no token that ends an answer")
    files = []
    for number, each in enumerate(saved.values()):
        files.append(folder / f"lora{number}" / FILE)
        export_gguf(replace(each, other_base=other_base), files[-1].parent, None)
    decoder = decoder_of(base.config)
    order = row_order if decoder.reorders else None
    weights = weights or ("float32" if base.dtype == torch.float32 else "float16")
    end = language.ends[0]
    write_model(base, decoder.name, end, folder / MODEL, weights=weights, reorder=order)
    positions = min(shared.positions or POSITIONS, POSITIONS)
    cells = CONTEXTS * positions
    server = start_server(folder, files, weights, slots=max_batch, cells=cells)
    compare(server, base, len(files), TOLERANCES[weights])
    base.to("meta")
    served = {
        shared.name: ServedAdapter(
            shared.name, language, BASE, LlamaLane(None, len(files)), positions
        )
    }
    for number, (name, each) in enumerate(saved.items()):
        own = reading_as_trained(base, shared.readers[name], each, {}, plain=plain)
        lane, path = LlamaLane(number, len(files)), str(each.run or each.adapter)
        served[name] = ServedAdapter(name, own, name, lane, positions, path)
    return served, LlamaEngine(server, cells, max_batch=max_batch, max_waiting=max_waiting)


def start_server(
    folder: Path, loras: Sequence[Path], weights: str, *, slots: int, cells: int
) -> Any:
    """Load a written model into llama.cpp.

    Args:
        folder: of the model.
        loras: files of adapters.
        weights: their type; with float32, keys and values have it too, else float16.
        slots: answers at a time.
        cells: tokens of all of them.
    """
    llama = optional("xllamacpp", EXTRA)
    options = llama.CommonParams()
    options.model.path = str(folder / MODEL)
    options.lora_adapters = [llama.CommonAdapterLoraInfo(str(each), 0.0) for each in loras]
    options.hostnames = [str(folder / "socket.sock")]  # no port of this machine
    options.n_parallel, options.n_ctx, options.kv_unified = slots, cells, True
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = torch.get_num_threads()
    precise = weights == "float32"
    kind = llama.ggml_type.GGML_TYPE_F32 if precise else llama.ggml_type.GGML_TYPE_F16
    options.cache_type_k = options.cache_type_v = kind
    if precise:  # its fused attention computes in 16 bits
        options.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    options.cache_ram_mib = 0  # no copies of the keys and values of earlier requests
    options.warmup = options.fit_params = False
    options.verbosity = 0
    return llama.Server(options)


@contextmanager
def in_float32(model: nn.Module) -> Generator[None]:
    """In the block, modules compute in float32, with weights that are widened for their own pass.

    A model in bfloat16 is further from itself in float32 than llama.cpp in float16 is.
    """
    dtypes = {each: each.dtype for each in model.parameters() if each.dtype != torch.float32}

    def cast(module: nn.Module, *_: object, widened: bool) -> None:
        for each in module.parameters(recurse=False):
            if each in dtypes and each.is_floating_point():
                each.data = each.to(torch.float32 if widened else dtypes[each])

    with ExitStack() as stack:
        for module in model.modules() if dtypes else ():
            before = module.register_forward_pre_hook(partial(cast, widened=True))
            after = module.register_forward_hook(partial(cast, widened=False))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def compare(server: Any, model: CausalModel, loras: int, tolerance: float) -> None:
    """Compare llama.cpp with transformers at one prompt of random tokens.

    Args:
        loras: number of adapters, which are left out.
        tolerance: of the log probability of the likeliest token.

    Raises:
        UnsupportedError: the likeliest token has another probability, as of a model with a part
            that the written file does not hold.
    """
    generator = torch.Generator().manual_seed(0)
    count = min(64, max_positions(model) or 64) - 1
    ids = torch.randint(model.config.vocab_size, (count,), generator=generator).tolist()
    lane = LlamaLane(None, loras)
    asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": 1, "lora": lane.scales}
    found = server.handle_completions(asked)
    if "error" in found:
        raise RunStopped(f"{NAME} does not answer: {found['error'].get('message')}")
    entry = found["choices"][0]["logprobs"]["content"][0]
    with in_float32(model):
        expected = next_token(model, ids)
    gap = max(abs(float(expected[entry["id"]]) - entry["logprob"]), 0.0)
    gap = max(gap, float(expected.max() - expected[entry["id"]]))
    logger.info("%s: log probability of a token differs by %.1e from transformers", NAME, gap)
    if gap > tolerance:
        raise UnsupportedError(
            f"{NAME} computes something else for this model: the log probability of a token "
            f"differs by {gap:.2g}, at most {tolerance}: take --engine petl"
        )
