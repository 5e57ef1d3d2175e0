"""The choice of a request's next token.

Shapes: V tokens of the vocabulary, T tokens of prompt and answer so far.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from petl.generation.inference.sampling import Sampling

# below it the most likely token is taken: the division by it would overflow, in float32
LOWEST_TEMPERATURE = 1e-5


class LogProb(NamedTuple):
    """A token with the logarithm of its probability before temperature, penalties and cuts."""

    token: int
    value: float


@dataclass(frozen=True)
class TokenChooser:
    """Settings of a request beside those of `Sampling`.

    Attributes:
        seed: of its random numbers; None: other ones each time.
        presence_penalty: subtracted from the logits of tokens that the answer has.
        frequency_penalty: likewise, times the number of their occurrences.
        logit_bias: added to the logits of these tokens.
        top_logprobs: number of most likely tokens to report with each token; None: no
            probabilities at all.
    """

    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None


class OccurrencePenalty(LogitsProcessor):
    """Makes tokens less likely that occur behind the first `start` ones."""

    def __init__(self, presence: float, frequency: float, start: int) -> None:
        self.presence, self.frequency, self.start = presence, frequency, start

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the lowered scores, [1, V]."""
        # tokens of the answer only: those of the prompt are not penalized
        counts = torch.bincount(input_ids[0, self.start :], minlength=scores.shape[-1])
        # OpenAI's formula: logit - presence [count > 0] - frequency count
        return scores - self.presence * (counts > 0) - self.frequency * counts


class Chooser:
    """Chooses the tokens of one answer, independently of the other rows of a batch.

    Attributes:
        max_tokens: tokens of the answer at most.
        is_argmax: True if the next token is that of the highest logit, and nothing else is asked
            for, so that `choose` need not be called.
    """

    def __init__(
        self,
        sampling: Sampling,
        choosing: TokenChooser,
        defaults: GenerationConfig,
        prompt: Sequence[int],
    ) -> None:
        arguments = sampling.arguments(defaults)
        self.max_tokens: int = arguments["max_new_tokens"]
        self.top_logprobs = choosing.top_logprobs
        self.ids = [*prompt]  # then of the answer too: the repetition penalty counts both
        # what requests can set
        unset = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        # a generation config has None for what it leaves at the default
        values = {name: getattr(defaults, name) or value for name, value in unset.items()}
        values |= arguments  # those of the request win
        self.samples = values["do_sample"] and values["temperature"] >= LOWEST_TEMPERATURE
        values["do_sample"] = self.samples
        self.processors = processors(values, choosing, defaults, len(prompt))
        self.is_argmax = not (self.processors or self.samples or self.top_logprobs is not None)
        # on the CPU, so that a seed gives the same numbers on every device
        self.random = torch.Generator()
        if choosing.seed is None:
            self.random.seed()  # from the system's entropy
        else:
            self.random.manual_seed(choosing.seed)

    def choose(self, logits: Tensor) -> tuple[int, list[LogProb]]:
        """Choose a token.

        Args:
            logits: of the next token, [V].

        Returns:
            The token; and, if asked for, its log probability, followed by those of the most likely
            tokens.
        """
        logits = logits.float().cpu()  # where the generator is
        ids: Any = torch.tensor([self.ids])
        (scores,) = self.processors(ids, logits[None])
        if self.samples:
            token = int(torch.multinomial(scores.softmax(-1), 1, generator=self.random))
        else:
            token = int(scores.argmax())
        self.ids.append(token)
        return token, self._logprobs(logits, token)

    def _logprobs(self, logits: Tensor, token: int) -> list[LogProb]:
        if self.top_logprobs is None:
            return []
        # without the processors, so that settings do not change what is reported
        values = logits.log_softmax(-1)
        best = values.topk(min(self.top_logprobs, len(values)))  # a vocabulary may be smaller
        likely = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [LogProb(token, values[token].item()), *(LogProb(*each) for each in likely)]


def processors(
    values: Mapping[str, Any],
    choosing: TokenChooser,
    defaults: GenerationConfig,
    prompt_length: int,
) -> LogitsProcessorList:
    """The changes to the logits of a request, in the order of transformers' `generate`.

    Args:
        values: of what requests can set.
        defaults: have what only the model sets.
    """
    found: list[LogitsProcessor] = []
    if choosing.logit_bias:
        found.append(
            SequenceBiasLogitsProcessor([[[t], b] for t, b in choosing.logit_bias.items()])
        )
    if values["repetition_penalty"] != 1:
        found.append(RepetitionPenaltyLogitsProcessor(values["repetition_penalty"]))
    if choosing.presence_penalty or choosing.frequency_penalty:
        presence, frequency = choosing.presence_penalty, choosing.frequency_penalty
        found.append(OccurrencePenalty(presence, frequency, prompt_length))
    found += _forbidding(defaults, prompt_length)
    if values["do_sample"]:
        found += _cutting(values, defaults)
    return LogitsProcessorList(found)


def _forbidding(defaults: GenerationConfig, prompt_length: int) -> list[LogitsProcessor]:
    """The processors of tokens that a model's generation config forbids."""
    found: list[LogitsProcessor] = []
    ends: Any = defaults.eos_token_id  # None and lists as well
    if defaults.no_repeat_ngram_size:
        found.append(NoRepeatNGramLogitsProcessor(defaults.no_repeat_ngram_size))
    if defaults.bad_words_ids:
        found.append(NoBadWordsLogitsProcessor(defaults.bad_words_ids, ends))
    if defaults.min_length and ends is not None:
        found.append(MinLengthLogitsProcessor(defaults.min_length, ends))
    if defaults.min_new_tokens and ends is not None:
        found.append(
            MinNewTokensLengthLogitsProcessor(prompt_length, defaults.min_new_tokens, ends)
        )
    if defaults.suppress_tokens:
        found.append(SuppressTokensLogitsProcessor(defaults.suppress_tokens))
    if defaults.begin_suppress_tokens:
        tokens = defaults.begin_suppress_tokens
        found.append(SuppressTokensAtBeginLogitsProcessor(tokens, prompt_length))
    return found


def _cutting(values: Mapping[str, Any], defaults: GenerationConfig) -> list[LogitsProcessor]:
    """The processors of the distribution that tokens are drawn from."""
    found: list[LogitsProcessor] = []
    if values["temperature"] != 1:
        found.append(TemperatureLogitsWarper(float(values["temperature"])))
    if values["top_k"]:
        found.append(TopKLogitsWarper(values["top_k"]))
    if values["top_p"] < 1:
        found.append(TopPLogitsWarper(values["top_p"]))
    if defaults.min_p:
        found.append(MinPLogitsWarper(defaults.min_p))
    if defaults.typical_p and defaults.typical_p < 1:
        found.append(TypicalLogitsWarper(defaults.typical_p))
    return found
